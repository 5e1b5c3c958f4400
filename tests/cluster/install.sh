#!/usr/bin/env bash
# Installs what the cluster tests need from Debian's packages, where it is missing.
set -euo pipefail
if command -v slurmctld && command -v /usr/sbin/sshd && command -v ip && command -v nsenter; then exit; fi >/dev/null
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "Slurm is missing: the cluster tests are skipped (as root on Debian they install slurm-wlm themselves)" >&2
    exit
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Its own services are not wanted: the tests start what they need.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f $policy' EXIT
fi
apt-get install -qq -y --no-install-recommends slurm-wlm munge openssh-server openssh-client iproute2 util-linux
