#!/usr/bin/env bash
# Starts the ranks of this node and waits for them. The scripts beside it call it with the arguments of
# pipeline/train.py, and in the environment: PYTHON, LAUNCHER, PREFLIGHT, NETWORK_INTERFACE (settings.sh); NODES, RANKS
# (of this node), HEAD (address), PORT, RUN_ID, LOGS (folder), NODE_RESTARTS (by the launcher itself), STOP_FILE (that
# the signals of a batch system become, if there is one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # this tree's code, installed or not
if [[ ${1:-} == --print-run-dir ]]; then exec "$PYTHON" pipeline/train.py "$@"; fi

read -r address interface < <("$PYTHON" launch/address.py "$HEAD" "$NETWORK_INTERFACE")
export GLOO_SOCKET_IFNAME=$interface # gloo's own choice is what the host name resolves to
if [[ $NETWORK_INTERFACE ]]; then export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE; fi
is_host=$([[ $address == "$HEAD" && ${SLURM_NODEID:-0} == 0 ]] && echo true || echo false)

# Both launchers are torch's elastic agent, and take from PET_* what has no option in `accelerate launch`.
export PET_LOCAL_ADDR=$address PET_RDZV_ID=$RUN_ID PET_RDZV_ENDPOINT=$HEAD:$PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${STOP_FILE:-} ]]; then # Slurm signals all processes of a step: a launcher would end its ranks
    trap '' TERM USR1
    export PET_SIGNALS_TO_HANDLE=SIGHUP
fi
if ((NODE_RESTARTS)); then # a fresh store for each start: nodes may count restarts differently, and read old addresses
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
LOGS+=/${SLURMD_NODENAME:-$HOSTNAME}
mkdir -p "$LOGS"
if [[ $LAUNCHER == accelerate ]]; then
    words=(-m accelerate.commands.launch --config_file launch/accelerate/one_process.yaml --tee 3 --log_dir "$LOGS"
        --num_cpu_threads_per_process "$OMP_NUM_THREADS" --max_restarts "$NODE_RESTARTS")
    if ((NODES * RANKS > 1)); then
        words+=(--multi_gpu --num_machines "$NODES" --machine_rank "${SLURM_NODEID:-0}"
            --num_processes $((NODES * RANKS)) --main_process_ip "$HEAD" --main_process_port "$PORT"
            --rdzv_backend c10d --rdzv_conf "is_host=$is_host")
    fi
else
    words=(-m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "$NODE_RESTARTS"
        --rdzv-backend c10d --rdzv-conf "is_host=$is_host" --tee 3 --log-dir "$LOGS")
fi

# Beside the launcher: what a signal to the step means for the ranks, and an end where the launcher has none. It asks
# the head for news without a limit of time, and where the network is gone would outlive its ranks.
watch() { # watch PID: of the launcher, whose children are the ranks, and this loop
    local limit=$((NODE_RESTARTS ? 660 : 60)) ranks_seen='' idle_since=$SECONDS children=() signal=''
    if [[ ${STOP_FILE:-} ]]; then trap 'signal=TERM' TERM USR1; fi
    while grep -sq . "/proc/$1/cmdline"; do # one that has ended has no command, even if nobody has asked for its end
        if [[ $signal ]]; then touch "$STOP_FILE" "$LOGS/signalled"; fi # again: a rank that starts removes an old one
        sleep 2 || true                                                 # a signal ends it as well
        read -ra children <<<"$(cat "/proc/$1/task/"*/children 2>/dev/null || true)"
        children=("${children[@]/#//proc/}")
        if (($(grep -sl . "${children[@]/%//cmdline}" | wc -l || true) > 1)); then
            ranks_seen=yes idle_since=$SECONDS
        elif [[ $ranks_seen ]] && ((SECONDS - idle_since > limit)); then
            echo "$HOSTNAME: the ranks ended $limit s ago and the launcher hangs: ending it (is the network up?)" >&2
            kill -KILL "$1"
        fi
    done
}
watch $$ &
if [[ $PREFLIGHT == yes && " $* " != *" --dry-run "* ]]; then # ranks come minutes apart where torch is read over a network
    exec "$PYTHON" "${words[@]}" -m pipeline.preflight --then-train --timeout-seconds 120 "$@"
fi
exec "$PYTHON" "${words[@]}" pipeline/train.py "$@"
