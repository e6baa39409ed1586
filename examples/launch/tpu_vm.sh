#!/usr/bin/env bash
# A TPU VM with one host (v5e-1, v5e-4, v5e-8, v6e-8): to be run on it.
#
#   WORKDIR=gs://BUCKET/runs/uptrain CONFIG=uptrain:model=B/16,recipe=modern \
#       examples/launch/tpu_vm.sh --config.init=gs://BUCKET/converted \
#       --config.data.data_dir=/mnt/data
set -euo pipefail
: "${WORKDIR:?gs://BUCKET/NAME, or a directory on a disk that outlives the VM}"
: "${CONFIG:?a name and arguments, such as uptrain:model=B/16,recipe=modern}"

kdgqa doctor --config "$CONFIG" --workdir "$WORKDIR" "$@"
exec kdgqa train --config "$CONFIG" --workdir "$WORKDIR" "$@"
