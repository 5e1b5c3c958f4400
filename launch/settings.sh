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

address_of() { # the IPv4 address of a host that other machines reach, a private one if it has one; empty without any
    local found
    found=$(getent ahostsv4 "$1" | sed '/^127\./d;s/ .*//') || true
    grep -m 1 -E '^(10|192\.168|172\.(1[6-9]|2[0-9]|3[01]))\.' <<<"$found" || head -n 1 <<<"$found"
}

help_of() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; } # the comment at the head of a script
