# shellcheck shell=bash
# The site's settings: defaults, and launch/site.env over them. Sourced by the scripts here, in the repository's root.
# shellcheck disable=SC2034 # the scripts that source this read them
PYTHON=python3
if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
LAUNCHER=torchrun
RANKS_PER_NODE=
MAX_RESTARTS=3
NETWORK_INTERFACE=
CONTAINER=()
# shellcheck source=launch/site.env.example
if [[ -f launch/site.env ]]; then source launch/site.env; fi
export PYTHON LAUNCHER NETWORK_INTERFACE
