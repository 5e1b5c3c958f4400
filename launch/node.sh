#!/usr/bin/env bash
# Starts the ranks of this node and waits for them. The scripts beside it call it with the arguments of
# pipeline/train.py, and in the environment: PYTHON, LAUNCHER, NETWORK_INTERFACE (settings.sh); NODES, RANKS (of this
# node), HEAD (address), PORT, RUN_ID, LOGS (folder), NODE_RESTARTS (by the launcher itself), RANKS_GET_SIGNALS (yes:
# from the batch system).
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
if [[ ${RANKS_GET_SIGNALS:-} == yes ]]; then # Slurm signals all processes of a step: a launcher would end its ranks
    trap '' TERM USR1
    export PET_SIGNALS_TO_HANDLE=SIGHUP
fi
if ((NODE_RESTARTS)); then # a fresh store for each start: nodes may count restarts differently, and read old addresses
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
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

# The launcher asks the head for news without a limit of time, and where the network is gone would outlive its ranks.
watch() { # watch PID: ends it when its ranks, its children, have been gone for too long (a restart waits for others)
    local limit=$((NODE_RESTARTS ? 660 : 60)) ranks_seen='' idle_since=$SECONDS children=()
    while sleep 2 && [[ -d /proc/$1 ]]; do
        read -ra children <<<"$(cat "/proc/$1/task/"*/children 2>/dev/null || true)"
        # One child is this loop. Ranks that have ended, but that nobody has asked for their exit code, have no command.
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
exec "$PYTHON" "${words[@]}" pipeline/train.py "$@"
