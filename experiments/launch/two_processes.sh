#!/bin/bash
# A run of two processes on this machine, each with 4 virtual CPU devices: what several
# hosts do, on one. When one fails, both end.
#   RUN=runs/two experiments/launch/two_processes.sh [flags of grpo-jax train]
# Run it again to resume. Times mean nothing: all devices share this machine's cores.
set -eu
: "${RUN:=runs/two_processes}"
: "${PORT:=8476}"
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4

resume=()
if [ -e "$RUN/config.json" ]; then resume=(--resume); fi

pids=()
# Where one failed the other would wait for it. Checkpoints are complete at any time.
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT
# On SIGTERM they save a checkpoint and end with 0.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for process in 0 1; do
    grpo-jax train --run-dir "$RUN" --mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1 \
        --distributed.coordinator "localhost:$PORT" \
        --distributed.processes 2 \
        --distributed.process "$process" \
        "${resume[@]}" "$@" &
    pids+=("$!")
done

while [ "${#pids[@]}" -gt 0 ]; do
    code=0
    wait -n -p ended "${pids[@]}" || code=$?
    if [ -z "${ended:-}" ]; then continue; fi # a signal came
    left=()
    for pid in "${pids[@]}"; do
        if [ "$pid" != "$ended" ]; then left+=("$pid"); fi
    done
    pids=("${left[@]}")
    if [ "$code" -ne 0 ]; then
        echo "a process ended with $code; ending the run" >&2
        exit 1
    fi
done
