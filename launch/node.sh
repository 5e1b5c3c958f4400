#!/usr/bin/env bash
# shellcheck disable=SC2154,SC2312 # `set -u` finds what a caller did not set; `read` fails with its command
# Starts the ranks of this node and waits for them. The scripts beside it call it with the arguments of
# pipeline/train.py, and in the environment: PYTHON, LAUNCHER, PREFLIGHT, NETWORK_INTERFACE (settings.sh); NODES, RANKS
# (of this node), HEAD (address), PORT, RUN_ID, LOGS (folder), NODE_RESTARTS (by the launcher itself), RENDEZVOUS_SECRET
# (of all nodes, if there are several), STOP_FILE (that the signals of a batch system become, if there is one).
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # this tree's code, installed or not
if [[ ${1:-} == --print-run-dir ]]; then exec "$PYTHON" pipeline/train.py "$@"; fi
source launch/functions.sh
if [[ ! $NODES =~ ^[[:digit:]]{1,9}(:[[:digit:]]{1,9})?$ ]]; then
    printf 'error: NODES: expected N or MIN:MAX, found %q\n' "${NODES:0:100}" >&2
    exit 2
fi
RANKS=$(whole_number RANKS "$RANKS")
PORT=$(whole_number PORT "$PORT")
NODE_RESTARTS=$(whole_number NODE_RESTARTS "$NODE_RESTARTS")

if [[ $NODES == 1 ]]; then # nobody else needs to reach this machine: the launcher takes a free port of the loopback
    HEAD=127.0.0.1 PORT=0 NETWORK_INTERFACE=
    RENDEZVOUS_SECRET=$(head -c 32 /dev/urandom | base64)
    export RENDEZVOUS_SECRET
fi
read -r address interface < <("$PYTHON" launch/address.py "$HEAD" "$NETWORK_INTERFACE")
export GLOO_SOCKET_IFNAME=$interface # gloo's own choice is what the host name resolves to
if [[ $NETWORK_INTERFACE ]]; then export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE; fi
is_host=$([[ $address == "$HEAD" && ${SLURM_NODEID:-0} == 0 ]] && echo true || echo false)

# Both launchers are torch's elastic agent, and take from PET_* what has no option in `accelerate launch`.
export PET_LOCAL_ADDR=$address PET_RDZV_ID=$RUN_ID PET_RDZV_ENDPOINT=$HEAD:$PORT
# How long they let ranks save after a signal before they kill them; a batch system has a limit of its own.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
on_hangup=$(trap -p HUP)
if [[ $on_hangup == *"''"* ]]; then # nohup: a launcher would handle the signal that it should ignore
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
rendezvous=fixed conf=is_host=$is_host,ranks=$RANKS # pipeline/launcher.py tells what these are
if [[ $NODES == *:* ]] || { ((NODE_RESTARTS)) && [[ $NODES != 1 ]]; }; then
    rendezvous=elastic
elif [[ ${STOP_FILE:-} ]]; then # Slurm numbers the nodes
    conf+=,node_rank=$SLURM_NODEID
fi
LOGS+=/${SLURMD_NODENAME:-$HOSTNAME}
mkdir -p "$LOGS"
if [[ $LAUNCHER == accelerate ]]; then
    words=(-m pipeline.launcher accelerate --config_file launch/accelerate/one_process.yaml --tee 3 --log_dir "$LOGS"
        --num_cpu_threads_per_process "$OMP_NUM_THREADS" --max_restarts "$NODE_RESTARTS")
    if ((NODES * RANKS > 1)); then
        words+=(--multi_gpu --num_machines "$NODES" --machine_rank "${SLURM_NODEID:-0}"
            --num_processes $((NODES * RANKS)) --main_process_ip "$HEAD" --main_process_port "$PORT"
            --rdzv_backend "$rendezvous" --rdzv_conf "$conf")
    fi
else
    words=(-m pipeline.launcher torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "$NODE_RESTARTS"
        --rdzv-backend "$rendezvous" --rdzv-conf "$conf" --tee 3 --log-dir "$LOGS")
fi

script=launch/start.py
if [[ $PREFLIGHT != yes || " $* " == *" --dry-run "* ]]; then script=pipeline/train.py; fi

# A launcher asks the head for news without a limit of time, and where the network is gone would outlive its ranks.
watch() { # watch PID: ends the launcher when its ranks have been gone for too long (a restart waits for others)
    local limit=$((NODE_RESTARTS ? 660 : 60)) ranks_seen='' idle_since=$SECONDS children=()
    while grep -sq . "/proc/$1/cmdline"; do # one that has ended has no command, even if nobody has asked for its end
        if [[ $signal ]]; then # again and again: a rank that starts removes an old one
            make_marker "$STOP_FILE"
            make_marker "$LOGS/signalled"
        fi
        sleep 1 &
        wait $! || true # a signal ends the waiting
        read -ra children <<<"$(cat "/proc/$1/task/"*/children 2>/dev/null || true)"
        children=("${children[@]/#//proc/}")
        if (($(grep -sl . "${children[@]/%//cmdline}" | wc -l || true) > watchers)); then
            ranks_seen=yes idle_since=$SECONDS
        elif [[ $ranks_seen ]] && ((SECONDS - idle_since > limit)); then
            echo "$HOSTNAME: the ranks ended $limit s ago and the launcher hangs: ending it (is the network up?)" >&2
            kill -KILL "$1"
        fi
    done
}

signal=
if [[ ${STOP_FILE:-} ]]; then # Slurm signals this shell, and at some sites its children: a launcher would end its ranks
    trap 'signal=TERM' TERM USR1 USR2
    export PET_SIGNALS_TO_HANDLE=SIGHUP
    (trap '' TERM USR1 USR2 && exec "$PYTHON" "${words[@]}" "$script" "$@") &
    started=$! watchers=0
    watch "$started"
    wait "$started"
else # a terminal's Ctrl-C is the launcher's
    watchers=1
    watch $$ &
    exec "$PYTHON" "${words[@]}" "$script" "$@"
fi
