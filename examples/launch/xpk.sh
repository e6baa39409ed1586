#!/usr/bin/env bash
# A TPU slice in a GKE cluster, by XPK; the image has kdgqa-jax[tpu,cloud] installed.
#
#   CLUSTER=my-cluster ZONE=us-west4-a TPU_TYPE=v5litepod-256 IMAGE=REGISTRY/kdgqa \
#       WORKDIR=gs://BUCKET/runs/uptrain CONFIG=uptrain:model=L/16,recipe=modern \
#       examples/launch/xpk.sh --config.init=gs://BUCKET/converted \
#       --config.data.data_dir=/mnt/data
#
# GKE starts the processes again when one of them fails or is preempted; they resume.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${ZONE:?where it is}" "${TPU_TYPE:?such as v5litepod-256}"
: "${IMAGE:?of a container with kdgqa}" "${WORKDIR:?gs://BUCKET/NAME}"
: "${CONFIG:?a name and arguments, such as uptrain:model=L/16,recipe=modern}"

command=$(printf '%q ' kdgqa train --multihost --config "$CONFIG" --workdir "$WORKDIR" "$@")
exec xpk workload create --workload="${WORKLOAD:-kdgqa}" --cluster="$CLUSTER" --zone="$ZONE" \
    --tpu-type="$TPU_TYPE" --docker-image="$IMAGE" --max-restarts=100 --command="$command"
