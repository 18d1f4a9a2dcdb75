#!/bin/bash
# A run over the hosts of a TPU pod slice; they find each other by the slice's metadata.
#   TPU=my-pod ZONE=us-central2-b RUN=/mnt/shared/runs/mine \
#       experiments/launch/tpu_pod.sh [flags of grpo-jax train]
# Run it again to resume. mesh.data x fsdp x tensor is the devices of the slice: 8 here.
# Every host needs the environment: gcloud ... ssh --worker=all --command="pip install ...".
set -eu
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
: "${RUN:?the run directory, on a file system that all hosts mount}"

command=$(cat <<'HOST'
set -eu
resume=()
if [ -e "$RUN/config.json" ]; then resume=(--resume); fi
grpo-jax train --run-dir "$RUN" --mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1 \
    "${resume[@]}" "$@"
HOST
)
# Quoted here, read by each host's shell.
printf -v remote '%q ' env "RUN=$RUN" bash -c "$command" grpo-jax "$@"
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$remote"
