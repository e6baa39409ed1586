#!/usr/bin/env bash
# A TPU slice of several hosts: one command starts the run on all of them; to be run anywhere.
#
#   TPU=my-slice ZONE=us-west4-a WORKDIR=gs://BUCKET/runs/uptrain \
#       CONFIG=uptrain:model=L/16,recipe=modern examples/launch/tpu_slice.sh \
#       --config.init=gs://BUCKET/converted --config.data.data_dir=/mnt/data
#
# The same command resumes: when a host was taken away, when the slice is another one, of any size.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?where it is}"
: "${WORKDIR:?gs://BUCKET/NAME}"
: "${CONFIG:?a name and arguments, such as uptrain:model=L/16,recipe=modern}"

command=$(printf '%q ' kdgqa train --multihost --config "$CONFIG" --workdir "$WORKDIR" "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
