#!/usr/bin/env bash
# One search on machines of a cloud, or on several launchers of one machine, without a scheduler.
# Start it on every machine, with the address of the first:
#
#   NODES=2 FIRST=10.0.0.1:29500 examples/launch/nodes.sh optimize digits/edm2 --out runs/a
#
# NODES      machines; "1:4" lets the search begin with one and take up to four as they come
# FIRST      address and port of the machine that all meet at
# PROCESSES  of each machine: a number, or gpu (default where there is one)
# JOB        a name that is the same on all machines and after a restart of all of them: a run that
#            was begun under it goes on
set -euo pipefail

NODES=${NODES:?machines, such as 2}
FIRST=${FIRST:?address of the first machine, such as 10.0.0.1:29500}
JOB=${JOB:-mergerl}
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=1
    if command -v nvidia-smi > /dev/null; then PROCESSES=gpu; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="$PROCESSES" --max-restarts="${RESTARTS:-10}" \
    --rdzv-backend=c10d --rdzv-endpoint="$FIRST" --rdzv-id="$JOB" \
    -m merge_rl "$@"
