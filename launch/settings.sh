# shellcheck shell=bash
# The site's settings: defaults, and launch/site.env over them. Sourced by the scripts here, in the repository's root.
# shellcheck disable=SC2034 # the scripts that source this read them
source launch/functions.sh
PYTHON=python3
if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
LAUNCHER=torchrun
PREFLIGHT=yes
RANKS_PER_NODE=
MAX_RESTARTS=3
NETWORK_INTERFACE=
CONTAINER=()
# shellcheck source=launch/site.env.example
if [[ -f launch/site.env ]]; then source launch/site.env; fi
export PYTHON LAUNCHER PREFLIGHT NETWORK_INTERFACE

ranks_here() { # RANKS_PER_NODE, or one for each GPU, or one
    local gpus
    if [[ $RANKS_PER_NODE ]]; then
        whole_number RANKS_PER_NODE "$RANKS_PER_NODE"
        return
    fi
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    fi || true
    echo "$((gpus > 0 ? gpus : 1))"
}

help_of() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; } # the comment at the head of a script
