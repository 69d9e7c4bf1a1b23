# shellcheck shell=bash
# What the batch scripts share: one process a task, stopped in time, requeued, continued.
#
# SLURM's own srun starts the processes. A launcher between it and Python would keep signals from
# arriving and exit statuses from leaving; everything here rests on both:
#   0              the job has finished
#   75             it was stopped, and has saved, or lost another process: requeue (EX_TEMPFAIL)
#   above 128      a signal ended a process, as a lost node or a lack of memory does: requeue
#   anything else  an error that would come again: the job has failed

stopped=75
repeat_seconds=20 # a signal that comes while srun is still starting is lost

# Run one of pipelines/ with its arguments, as this job's tasks; never returns.
run_job() {
    interrupted=
    trap 'interrupted=1' USR1 # until there are processes to pass it on to
    cd "$SLURM_SUBMIT_DIR" || exit 1
    read_site
    check_world
    describe_world
    start "$@"
    wait_for_end
    finish
}

say() {
    echo "job $(job_id): $*" >&2
}

fail() {
    say "Error: $*"
    exit 1
}

# An array's task has a number of its own, but for one of them that is the whole array's.
job_id() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# --- the site ------------------------------------------------------------------------------------

read_site() {
    local site=${GLOWSCALE_SITE:-slurm/site.sh}
    unset SBATCH_PARTITION SBATCH_ACCOUNT
    container_options=() container_command=()
    [[ -f $site ]] || fail "$site, the site's settings, is missing."
    set +u # what others wrote (modules, virtual environments) reads variables that are not set
    # shellcheck source=slurm/site.sh
    source "$site"
    activate || fail "\`activate\` of $site failed."
    set -u
    warn_unless partition "${SLURM_JOB_PARTITION:-}" "${SBATCH_PARTITION:-}" "$site"
    warn_unless account "${SLURM_JOB_ACCOUNT:-}" "${SBATCH_ACCOUNT:-}" "$site"
}

# Args: what, what the job has, what the site says (one or a list), the site's file.
warn_unless() {
    if [[ -n $3 && ",$3," != *",$2,"* ]]; then
        say "Warning: the job's $1 is '$2', but $4 says '$3'; \`source $4\` before sbatch."
    fi
}

# --- the processes -------------------------------------------------------------------------------

# Abort at once where not every process would start, or a GPU would be idle or shared.
check_world() {
    local nodes=$SLURM_JOB_NUM_NODES tasks=$SLURM_NTASKS each=${SLURM_NTASKS_PER_NODE:-}
    local mend="submit with --nodes and --ntasks-per-node, and without --ntasks"
    if [[ -z $each ]] || ((tasks != nodes * each)); then
        fail "$nodes nodes × ${each:-an unknown number of} tasks a node are not the $tasks" \
            "tasks that SLURM would start; $mend."
    fi
    if [[ -n ${SLURM_GPUS_ON_NODE:-} && $SLURM_GPUS_ON_NODE != "$each" ]]; then
        fail "There are $SLURM_GPUS_ON_NODE GPUs and $each tasks on a node, but each task takes" \
            "one GPU; submit with the same --gpus-per-node and --ntasks-per-node."
    fi
}

# Export what the processes need to find each other; a single one looks for nobody.
describe_world() {
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} PYTHONUNBUFFERED=1
    ((SLURM_NTASKS > 1)) || return 0
    export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
    MASTER_ADDR=$(head_address)
    MASTER_PORT=$(free_port "$MASTER_ADDR")
    export MASTER_ADDR MASTER_PORT
}

# The address of the job's first node, where rank 0 runs, as SLURM itself reaches it.
head_address() {
    local node address
    node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    address=$(patiently scontrol --oneliner show node "$node" |
        sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || true
    echo "${address:-$node}"
}

# A port that jobs beside this one, and starts before it, do not use: from 10000 to 29999, below
# those that systems give away by themselves. This shell runs on the node where it must be free.
free_port() {
    local port=$((10000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 20000)) tries
    for tries in {1..16}; do
        if ! (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
        port=$((10000 + (port - 10000 + tries * 16) % 20000))
    done
    fail "Sixteen ports of $1 from 10000 to 29999 are all in use."
}

# srun does not inherit --cpus-per-task, but does inherit sbatch's --export=NONE, and would end all
# processes at the first exit status that is not 0 where the site says so. --wait ends those that
# wait for one that is gone.
start() {
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST," \
        "$SLURM_NTASKS_PER_NODE per node"
    local script=$1
    shift
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_NTASKS" \
        --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --kill-on-bad-exit=0 --wait=60 --mpi=none --unbuffered --input=none --export=ALL \
        "${container_options[@]}" bash slurm/task.sh "${container_command[@]}" \
        python "$script" "$@" &
    srun_process=$!
}

# --- the end -------------------------------------------------------------------------------------

# Wait for srun; sets `status`. Signals to this shell are passed on to all processes.
wait_for_end() {
    local repeater=
    trap 'interrupted=1; pass_on USR1' USR1
    trap 'interrupted=1; pass_on TERM' TERM
    [[ -z $interrupted ]] || pass_on USR1
    while true; do
        interrupted=
        status=0
        wait "$srun_process" || status=$?
        [[ -n $interrupted ]] || break # otherwise `wait` tells the signal, not the end
    done
    trap '' USR1 TERM
    [[ -z $repeater ]] || kill "$repeater"
}

# Python saves and ends with 75, or, before its training begins, just ends.
pass_on() {
    say "$1 arrived and is passed on to the processes"
    kill -USR1 "$srun_process" 2>/dev/null || true
    [[ -z $repeater ]] || return 0
    while sleep "$repeat_seconds"; do
        kill -USR1 "$srun_process" 2>/dev/null || break
    done &
    repeater=$!
}

finish() {
    if ((status == 0)); then
        say "finished"
    elif ((status == stopped || status > 128)) || node_is_lost; then
        requeue
    else
        say "failed with status $status, and would fail again; it is not requeued"
    fi
    exit "$status"
}

# Whether SLURM misses one of the job's nodes: the processes on the others fail with any status.
node_is_lost() {
    scontrol --oneliner show node "$SLURM_JOB_NODELIST" 2>/dev/null |
        grep --quiet --extended-regexp ' State=\S*(DOWN|NOT_RESPONDING|FAIL|\*)'
}

# Let the job start again, unless SLURM is ending or requeueing it already.
requeue() {
    local job state
    job=$(job_id)
    state=$(patiently scontrol --oneliner show job "$job" |
        sed -n 's/.* JobState=\(\S*\).*/\1/p') || true
    if [[ $state != RUNNING && $state != SIGNALING ]]; then # it may be passing a signal on
        say "ended with status $status and is ${state:-unknown} to SLURM, not requeued from here"
        return
    fi
    say "ended with status $status; it is requeued and goes on from its last checkpoint"
    if patiently scontrol requeue "$job"; then
        trap - TERM
        sleep 120 # until SLURM ends this shell
    else
        say "SLURM refuses to requeue it; the same sbatch command goes on from its last checkpoint"
    fi
}

# Run a command until it succeeds: SLURM's controller may be restarting.
patiently() {
    local tries
    for tries in {1..5}; do
        ! "$@" || return 0
        ((tries == 5)) || sleep 10
    done
    return 1
}

# --- arrays --------------------------------------------------------------------------------------

# Set `part`, the options by which the array's task makes its part; none outside an array.
array_part() {
    part=()
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || return 0
    # shellcheck disable=SC2153 # SLURM sets them all
    local first=$SLURM_ARRAY_TASK_MIN last=$SLURM_ARRAY_TASK_MAX count=$SLURM_ARRAY_TASK_COUNT
    if ((last - first + 1 != count)); then
        fail "The array has $count tasks from $first to $last, so that parts of the images would" \
            "be missing; submit with --array=0-$((count - 1))."
    fi
    # shellcheck disable=SC2034 # the batch script reads it
    part=(--part "$((SLURM_ARRAY_TASK_ID - first))" --parts "$count")
}
