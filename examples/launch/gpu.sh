#!/usr/bin/env bash
# One GPU, or all GPUs of a node: one process drives them all.
#
#   WORKDIR=runs/uptrain CONFIG=uptrain:model=B/16,recipe=modern examples/launch/gpu.sh \
#       --config.init=converted --config.data.data_dir=/data
#
# Started again it resumes; it is started again here when it was preempted (status 143).
set -euo pipefail
: "${WORKDIR:?a directory, gs://BUCKET/NAME or s3://BUCKET/NAME}"
: "${CONFIG:?a name and arguments, such as uptrain:model=B/16,recipe=modern}"

status=143
while [ "$status" -eq 143 ]; do
    status=0
    kdgqa train --config "$CONFIG" --workdir "$WORKDIR" "$@" || status=$?
done
exit "$status"
