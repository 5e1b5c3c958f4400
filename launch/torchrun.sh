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
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/settings.sh
LAUNCHER=torchrun NODE_RESTARTS=0 NODES='' PORT=29400 hosts='' head=''
while (($#)); do
    case $1 in
    -h | --help)
        help_of "$0"
        exit
        ;;
    --hosts) hosts=${2:-} ;;
    --nodes) NODES=${2:-} ;;
    --head) head=${2:-} ;;
    --port) PORT=$(whole_number --port "${2:-}") ;;
    --max-restarts) NODE_RESTARTS=$(whole_number --max-restarts "${2:-}") ;;
    *) break ;;
    esac
    shift 2
done
IFS=, read -ra names <<<"$hosts"
for name in ${head:+"$head"} "${names[@]}"; do
    if [[ ! $name =~ ^[[:alnum:]_:][[:alnum:]_:.@%-]*$ ]]; then # it goes to ssh, getent and sed
        printf 'error: %q: expected the name of a host, or USER@HOST\n' "${name:0:100}" >&2
        exit 2
    fi
done
printed=$("${CONTAINER[@]}" bash "$PWD/launch/node.sh" --print-run-dir "$@" | tail -n 1) # MODE PATH
run_dir=${printed#* }

if [[ $hosts ]]; then
    words=("$PWD/launch/torchrun.sh" --nodes "${NODES:-${#names[@]}}" --head "${head:-${names[0]}}" --port "$PORT"
        --max-restarts "$NODE_RESTARTS" "$@")
    # An interrupt doesn't reach the background. A file in the run directory stops all ranks after the same step.
    trap 'make_run_dir "$run_dir" "${printed%% *}"; make_marker "$run_dir/STOP"; echo "saving and ending" >&2' INT TERM HUP
    command=$(printf '%q ' "${words[@]}")
    declare -A started
    for name in "${names[@]}"; do
        # shellcheck disable=SC2312 # sed fails only when this shell's output is gone
        ssh -o BatchMode=yes -- "$name" "$command" </dev/null > >(sed -u "s/^/$name: /") 2>&1 &
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

if [[ $NODES && $head ]]; then
    make_run_dir "$run_dir" "${printed%% *}"
else
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
