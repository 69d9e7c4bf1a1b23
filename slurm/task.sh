#!/bin/bash
# What srun starts, once a process, on the process's node: tells the process its place, and becomes
# it, so that signals and exit statuses pass between Python and SLURM with nobody in between.
set -euo pipefail

if ((${WORLD_SIZE:-1} > 1)); then
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    # Where SLURM binds GPUs to tasks, each sees one, and that is the first.
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} && $CUDA_VISIBLE_DEVICES != *,* ]]; then
        LOCAL_RANK=0
    fi
fi
exec "$@"
