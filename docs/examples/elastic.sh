#!/bin/bash
# BackMix on machines that come and go: the same command on each of 1 to 4 of them.
#
#   FIRST=host1 ./elastic.sh RUN RECIPE --data FILE.beton [options]
#
# A process that dies, or a machine that joins or leaves, makes torchrun start all processes anew
# with new numbers; each start goes on from the last checkpoint. Machines may be as many as a step
# has mix groups (--loader.batch / --loader.group), divided by the processes of each.

run=$1
shift
exec torchrun --nnodes "${MACHINES:-1:4}" --nproc-per-node "${PROCESSES:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${FIRST:-localhost}:${PORT:-29500}" --rdzv-id "$run" \
  --max-restarts "${RESTARTS:-10}" --shutdown-timeout 90 \
  -m backmix train "$@" --out "$run" --save-minutes 2
