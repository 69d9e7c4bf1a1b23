# shellcheck shell=bash disable=SC2034 # slurm/job.sh reads what is set here
# This cluster's settings, the one file to edit. `source slurm/site.sh` once before submitting, so
# that sbatch sees partition and account; every job reads the file again by itself.
# Another file in its place: export GLOWSCALE_SITE=/path/to/site.sh

# Partition and account, as `sinfo` and your group name them; without them, SLURM's defaults.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project

# The network that the processes talk over, as `ip -brief link` names it on the nodes; without it,
# NCCL and gloo choose, which goes wrong where a node's name leads to a slow or closed network.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# Makes `python` the one that has glowscale. Runs on the job's first node, from the repository's
# root; the processes on all nodes inherit what it exports.
activate() {
    # module purge
    # module load python/3.11 cuda/12.4
    if [[ -f .venv/bin/activate ]]; then
        # shellcheck source=/dev/null
        source .venv/bin/activate
    fi
}

# Containers, in one of two ways. Both need the repository, the data and the runs mounted at the
# paths that they have outside.
#
# With the pyxis plugin, options of srun:
# container_options=(--container-image="$HOME/glowscale.sqsh" --container-mounts="$PWD,/scratch"
#     --container-workdir="$PWD")
container_options=()
#
# Otherwise, the command that runs another inside:
# container_command=(apptainer exec --nv --bind "$PWD,/scratch" "$HOME/glowscale.sif")
container_command=()
