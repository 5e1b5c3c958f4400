#!/usr/bin/env bash
# Opens TensorBoard on one or several runs, side by side.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tensorboard.sh [--host ADDRESS] [--port PORT] [RUN ...]

Shows run directories side by side, each under its own name; without any, all below runs/ (new ones appear by
themselves). The page "Custom Scalars" has what matters most. It listens on this machine only (127.0.0.1); on a remote
one use `ssh -L 6006:localhost:6006 HOST`, or name an address with --host (0.0.0.0: everybody who reaches this machine).

  --host ADDRESS  where to listen (127.0.0.1)
  --port PORT     the port (6006)
TEXT
}

project=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
PATH="$project/.venv/bin:$PATH"
host=127.0.0.1 port=6006 runs=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --host | --port)
      [[ $# -ge 2 ]] || { echo "error: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    -*) echo "error: $1: unknown option; see --help" >&2; exit 2 ;;
    *) runs+=("${1%/}"); shift ;;
  esac
done
if ((${#runs[@]} == 0)); then
  watched=(--logdir "$project/runs")
else
  pairs=()
  for run in "${runs[@]}"; do
    [[ -d $run/tensorboard ]] || { echo "error: $run: no run directory (it has no folder tensorboard)" >&2; exit 2; }
    if [[ $run == *[,:]* ]]; then
      echo "error: $run: tensorboard splits names at commas and colons; open it by a link of another name" >&2
      exit 2
    fi
    pairs+=("$run:$run/tensorboard")
  done
  watched=(--logdir_spec "$(IFS=,; echo "${pairs[*]}")")
fi
echo "TensorBoard: http://$host:$port/#custom_scalars (Ctrl-C ends it)"
exec tensorboard "${watched[@]}" --host "$host" --port "$port" --reload_interval 10
