#!/usr/bin/env bash
# Pretrains on several machines without a batch system, by torchrun.
#
#   launch/torchrun.sh --hosts HOST,HOST,... [option ...] [--config configs/X.yaml] [key=value ...]
#       from any machine: starts itself on every host over ssh. Ctrl-C saves and ends the run.
#   launch/torchrun.sh --nodes N|MIN:MAX --head HOST [option ...] [--config configs/X.yaml] [key=value ...]
#       on every machine: waits at HOST, which is one of them, for the others.
#
#   --nodes MIN:MAX     go on with at least MIN machines when some are lost (wants --max-restarts)
#   --max-restarts N    start the ranks again after a failure, from the newest checkpoint; one failure may cost two (0)
#   --port P            of the rendezvous on the head (29400)
#
# All machines see the repository, the data and the run directory under the same paths. Relative paths start at the
# repository. launch/site.env has the rest: Python, ranks of a machine, network, container. Start it again to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/settings.sh
LAUNCHER=torchrun NODE_RESTARTS=0 NODES='' PORT=29400 hosts='' head=''
while (($#)); do
    case $1 in
    -h | --help)
        help_of "$0"
        exit
        ;;
    --hosts) hosts=$2 ;;
    --nodes) NODES=$2 ;;
    --head) head=$2 ;;
    --port) PORT=$2 ;;
    --max-restarts) NODE_RESTARTS=$2 ;;
    *) break ;;
    esac
    shift 2
done
run_dir=$("${CONTAINER[@]}" bash "$PWD/launch/node.sh" --print-run-dir "$@" | tail -n 1)

if [[ $hosts ]]; then
    IFS=, read -ra names <<<"$hosts"
    words=("$PWD/launch/torchrun.sh" --nodes "${NODES:-${#names[@]}}" --head "${head:-${names[0]}}" --port "$PORT"
        --max-restarts "$NODE_RESTARTS" "$@")
    # An interrupt doesn't reach the background. A file in the run directory stops all ranks after the same step.
    trap 'mkdir -p "$run_dir"; touch "$run_dir/STOP"; echo "saving and ending" >&2' INT TERM HUP
    declare -A started
    for name in "${names[@]}"; do
        ssh -o BatchMode=yes "$name" "$(printf '%q ' "${words[@]}")" </dev/null > >(sed -u "s/^/$name: /") 2>&1 &
        started[$name]=$!
    done
    code=0
    for name in "${names[@]}"; do
        ended=0
        until wait "${started[$name]}" && ended=0 || ended=$? && ! kill -0 "${started[$name]}" 2>/dev/null; do :; done
        if ((ended)); then
            echo "$name ended with exit code $ended" >&2
            code=$ended
        fi
    done
    exit "$code"
fi

if [[ -z $NODES || -z $head ]]; then
    help_of "$0" >&2
    exit 2
fi
HEAD=$(address_of "$head")
if [[ -z $HEAD ]]; then
    echo "--head $head: the name has no address that other machines reach; name an address" >&2
    exit 2
fi
if [[ $NODES != 1 && -z ${RENDEZVOUS_SECRET:-} ]]; then # all machines find the same one in the run directory
    secret=$run_dir/logs/.rendezvous-secret
    if [[ ! -s $secret ]]; then
        mkdir -p "$run_dir/logs"
        mine=$(mktemp "$secret.XXXXXXXX")
        head -c 32 /dev/urandom | base64 >"$mine"
        ln -T "$mine" "$secret" 2>/dev/null || mv -nT "$mine" "$secret" || true # another machine may have been first
        rm -f "$mine"
    fi
    RENDEZVOUS_SECRET=$(<"$secret")
    export RENDEZVOUS_SECRET
fi
RANKS=$(ranks_here)
export NODES RANKS HEAD PORT RUN_ID=pretrain LOGS=$run_dir/logs NODE_RESTARTS
exec "${CONTAINER[@]}" bash "$PWD/launch/node.sh" "$@"
