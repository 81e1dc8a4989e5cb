#!/bin/bash
# Runs torchrun as one task on each node of a job, from its batch script:
#
#     bash examples/slurm/on_each_node.sh torchrun ...
#
# Tasks get a job's signals in time, the batch script only when a preempted job's grace time is over.

set -euo pipefail

# srun does not take over sbatch's --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# --kill-on-bad-exit: an agent whose rank fails ends, and Slurm then ends those of the other nodes,
# which might notice only after parallel.timeout. --label: each line says which node it comes from.
srun --kill-on-bad-exit=1 --label bash examples/slurm/ranks_first.sh "$@" \
    && code=0 || code=$?

# Slurm queues a preempted job again only if it still runs at the end of its grace time. This one has
# saved and ended by then.
if [[ $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "this preempted job is not queued again"
fi
exit "$code"
