"""The parts of an sbatch script that are the same for every job; slurm.py puts them together."""

# What the file sets comes first: --env wins over it.
READ_ENV_FILE = r"""
# Read here, so that no value stands in this script. A line that fails ends the job; what bash says
# of it would show a value in the log.
: <"$ENV_FILE" || exit
exec 3>&2
where=
trap 'where=" line $LINENO"' ERR
trap 'echo "$ENV_FILE:$where fails in bash, whose words may hold a key and are left out" >&3' EXIT
set -aeE
# shellcheck source=/dev/null
source "$ENV_FILE" 2>/dev/null
set +aeE
trap - ERR EXIT
exec 3>&-
"""

RENDEZVOUS = r"""
# The address of the rendezvous: the one by which Slurm reaches the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do # the port is in use
    ((MASTER_PORT++))
done
export MASTER_ADDR MASTER_PORT
"""

BEFORE_TRAINING = r"""
# How this start ended, from outcome.json; empty if the run wrote none.
stamp() { stat --format='%i %y' "$RUN_DIR/outcome.json" 2>/dev/null; }
before=$(stamp)
outcome() {
    [[ $(stamp) == "$before" ]] && return
    sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p' "$RUN_DIR/outcome.json"
}

# The file STOP reaches every trainer; srun swallows signals, and accelerate dies of them. It is
# touched until all have ended: a trainer that has just started removes an older STOP.
stop() {
    while kill -0 "$step" 2>/dev/null; do
        touch "$RUN_DIR/STOP"
        sleep 1
    done
}

mkdir -p "$RUN_DIR"
rm -f "$RUN_DIR/STOP"
"""

AFTER_TRAINING = r"""
step=$!
wanted_back=
trap 'wanted_back=yes; stop' USR1 # time limit or preemption: save and requeue
trap stop TERM # scancel: save and end

# srun runs in the background, since bash runs traps only between commands or in `wait`.
wait "$step"
code=$?
if ((code > 128)); then # `wait` was interrupted by a trap
    wait "$step"
    code=$?
fi
rm -f "$RUN_DIR/STOP"

if [[ $(outcome) != preempted ]]; then
    exit "$code"
elif [[ ! $wanted_back ]]; then
    echo "stopped; sbatch resumes it" >&2
elif ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
    echo "preempted, and not queued again after $MAX_RESTARTS restarts; sbatch resumes it" >&2
else
    scontrol requeue "$SLURM_JOB_ID"
fi
exit 3
"""

AFTER_EXPORT = r"""
step=$!
# Nothing to save: the next start repeats unfinished tasks only.
again() {
    if ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "out of time, and not queued again after $MAX_RESTARTS restarts" >&2
        kill "$step"
        exit 3
    fi
}
trap again USR1
wait "$step"
"""
