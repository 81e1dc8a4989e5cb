#!/bin/bash
# Runs torchrun so that a signal reaches its ranks and not torchrun itself:
#
#     bash examples/slurm/ranks_first.sh torchrun ...
#
# SIGTERM and SIGUSR1 tell the ranks to finish their step, save and end; torchrun then ends with 0,
# as they do. torchrun itself would pass SIGTERM on, kill the ranks 30 seconds later and end with 1,
# and SIGUSR1 would end it at once and leave the ranks behind.

(
    trap '' USR1 # also in the ranks, until they train
    exec "$@"
) &
agent=$!

# The ranks are torchrun's only children.
tell_ranks() { pkill "-$1" --parent "$agent" || true; }
trap 'interrupted=1; tell_ranks TERM' TERM
trap 'interrupted=1; tell_ranks USR1' USR1

interrupted=1
while ((interrupted)); do
    interrupted=0
    wait "$agent" && code=0 || code=$?
done
exit "$code"
