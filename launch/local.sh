#!/usr/bin/env bash
# Pretrains on this machine: on all of its GPUs, or with N processes on its CPU.
#
#   launch/local.sh [--ranks N] [--config configs/X.yaml] [key=value ...]
#
# Without --ranks there is one for each GPU (CUDA_VISIBLE_DEVICES counts), or one on the CPU. The config is the
# trainer's default, the embedded digits, unless named; relative paths start at the repository. Start it again to resume.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/settings.sh
RANKS=$(ranks_here)
case ${1:-} in
-h | --help)
    help_of "$0"
    exit
    ;;
--ranks)
    RANKS=$(whole_number --ranks "${2:-}")
    shift 2
    ;;
*) ;;
esac
printed=$("${CONTAINER[@]}" bash "$PWD/launch/node.sh" --print-run-dir "$@" | tail -n 1) # MODE PATH
run_dir=${printed#* }
make_run_dir "$run_dir" "${printed%% *}"
export NODES=1 RANKS HEAD=127.0.0.1 PORT=0 RUN_ID=local LOGS=$run_dir/logs NODE_RESTARTS=0
exec "${CONTAINER[@]}" bash "$PWD/launch/node.sh" "$@"
