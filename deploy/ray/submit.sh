#!/bin/bash
# Hand a run to the cluster of cluster.yaml, from its head node: one worker on each of 16 GPUs.
#
#   deploy/ray/submit.sh /shared/first.toml
#   deploy/ray/submit.sh /shared/first.toml --set launch.ray.workers=8
#
# Submitted again it goes on from the last checkpoint. `ray job stop ID` saves and stops. The driver runs in the folder
# of the config, which every node must have; relative paths of the config are read from there.
set -euo pipefail
config=${1:?usage: submit.sh CONFIG [--set TABLE.KEY=VALUE ...]}
shift
folder=$(cd "$(dirname "$config")" && pwd)
command=(
  scope train "$(basename "$config")" --launcher ray --address auto --resume
  --set launch.ray.workers=16 --set launch.ray.gpus_per_worker=1 --set launch.ray.cpus_per_worker=8 "$@"
)
exec ray job submit --address "${RAY_DASHBOARD:-http://127.0.0.1:8265}" --no-wait -- \
  bash -c "cd $(printf '%q' "$folder") && exec $(printf '%q ' "${command[@]}")"
