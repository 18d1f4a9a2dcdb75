#!/bin/bash
# A run of two processes on this machine, each with 4 virtual CPU devices: what several
# hosts do, without them. When one fails, both end.
#   RUN=runs/two experiments/launch/two_processes.sh [flags of grpo-jax train]
# Run it again to go on. Seconds say nothing: all devices share this machine's cores.
set -eu
: "${RUN:=runs/two_processes}"
: "${PORT:=8476}"
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4

resume=()
if [ -e "$RUN/config.json" ]; then resume=(--resume); fi

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
# They save what they have and end with 0, if they are asked to.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for process in 0 1; do
    grpo-jax train --run-dir "$RUN" --mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1 \
        --distributed.coordinator "localhost:$PORT" \
        --distributed.processes 2 \
        --distributed.process "$process" \
        "${resume[@]}" "$@" &
    pids+=("$!")
done

# `wait -n` ends with each process, and when a signal came: then they are still there.
left=2
while [ "$left" -gt 0 ]; do
    code=0
    wait -n "${pids[@]}" || code=$?
    running=0
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then running=$((running + 1)); fi
    done
    if [ "$code" -ne 0 ] && [ "$running" -lt "$left" ]; then
        echo "a process ended with $code; ending the run" >&2
        exit "$code"
    fi
    left=$running
done
