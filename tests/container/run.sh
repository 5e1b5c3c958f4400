#!/usr/bin/env bash
# Builds docker/Dockerfile and tries it: a short run on the digits as a user who is not root, its health, its tests.
# All containers run with the flags that README.md and docker/compose.yaml have: read-only, and without any privilege.
#
# It takes docker if its daemon answers, else podman; as root on Debian it installs podman if there is neither.
# BASE_IMAGE names a base with python3 and pip. By default it is python:3.12-slim; where no registry can be reached, a
# Debian that mmdebstrap makes and that is kept in ~/.cache/vit-pretrain-tests. podman gets pip's configuration and
# the certificates of this machine as read-only mounts, while it builds only.
# shellcheck disable=SC2310 # `start` is one command: in a condition nothing of it is skipped
set -euo pipefail
CDPATH='' cd "$(dirname "$0")/../.."

work=$(mktemp -d)
image=vit-pretrain-test-$$
context=$work/context
# Flags of `docker run`: tests/container/test_flags.py compares them with README.md and docker/compose.yaml.
hardening=(--cap-drop ALL --security-opt no-new-privileges --read-only --tmpfs /tmp --pids-limit 16384)
volumes=(-v "$image-data:/app/data" -v "$image-runs:/app/runs" -v "$image-cache:/cache")
say() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

install_packages() {
  if ((EUID != 0)) || ! command -v apt-get > /dev/null; then fail "needs docker or podman; install one of them"; fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" > /dev/null
}

choose_engine() {
  if command -v docker > /dev/null && timeout 20 docker info > /dev/null 2>&1; then
    engine=(docker)
    return
  fi
  command -v podman > /dev/null || install_packages podman runc
  engine=(podman)
  # As root, in a storage of its own that goes at the end; runc works with every layout of control groups.
  if ((EUID == 0)); then
    engine+=(--root "$work/storage" --runroot "$work/run" --storage-driver overlay --events-backend file)
    engine+=(--cgroup-manager cgroupfs)
    if command -v runc > /dev/null; then engine+=(--runtime runc); fi
  fi
}

clean_up() {
  "${engine[@]:-true}" rm -f "$image" > /dev/null 2>&1 || true
  for tag in "$image" "$image-tests" "$image-base"; do
    "${engine[@]:-true}" rmi -f "$tag" > /dev/null 2>&1 || true
  done
  "${engine[@]:-true}" volume rm -f "$image-data" "$image-runs" "$image-cache" "$image-cache-of-any" > /dev/null 2>&1 || true
  if [[ -d $work/storage ]]; then "${engine[@]}" system reset --force > /dev/null 2>&1 || true; fi
  rm -rf "$work"
}
trap clean_up EXIT
trap 'echo "line $LINENO: $BASH_COMMAND" >&2' ERR

choose_base() {
  base=${BASE_IMAGE:-docker.io/library/python:3.12-slim}
  if timeout 120 "${engine[@]}" pull -q "$base" > /dev/null 2>&1; then return; fi
  [[ -z ${BASE_IMAGE:-} ]] || fail "can't pull BASE_IMAGE=$BASE_IMAGE"
  local cache=${XDG_CACHE_HOME:-$HOME/.cache}/vit-pretrain-tests  # not in /tmp: others could plant a base there
  mkdir -p "$cache"
  chmod 700 "$cache"
  if [[ ! -s $cache/base.tar ]]; then
    command -v mmdebstrap > /dev/null || install_packages mmdebstrap
    say "no registry: a base from Debian's packages"
    mmdebstrap --quiet --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$cache/part.tar"
    mv "$cache/part.tar" "$cache/base.tar"
  fi
  base=localhost/$image-base
  "${engine[@]}" import -q "$cache/base.tar" "$base" > /dev/null
}

# What pip needs on this machine, for podman: its configuration as one file, and each path that this names, read-only.
find_mounts() {
  mounts=()
  [[ ${engine[0]} == podman ]] || return 0
  local path paths
  paths=$(python3 - "$work/pip.conf" << 'PYTHON'
import os, re, subprocess, sys

listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
options = {}
for key, text in re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE):
    options.setdefault(key, []).extend(word for word in text.split() if word not in options.get(key, []))
with open(sys.argv[1], "w") as file:
    print("[global]", *(f"{key} = {' '.join(words)}" for key, words in options.items()), sep="\n", file=file)
for word in sorted({word for words in options.values() for word in words}):
    path = os.path.dirname(word.removeprefix("file://")) if word.startswith("file://") else word
    if path.startswith("/") and os.path.exists(path):
        print(path)
PYTHON
  )
  while read -r path; do mounts+=(-v "$path:$path:ro"); done <<< "$paths"
  mounts+=(-v "$work/pip.conf:/etc/pip.conf:ro")
}

build() {  # build TARGET TAG
  local options=(--build-arg "BASE_IMAGE=$base" --target "$1" -t "$2" -f "$context/docker/Dockerfile")
  if [[ ${engine[0]} == podman ]]; then options+=(--layers --pull=never --format docker --network host "${mounts[@]}"); fi
  "${engine[@]}" build "${options[@]}" "$context" > "$work/build.log" 2>&1 || { tail -30 "$work/build.log"; fail "build of $1"; }
}

start() {
  "${engine[@]}" run --pull never --network none --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 "${hardening[@]}" "$@"
}
wait_until() {  # wait_until SECONDS MESSAGE COMMAND...
  local second
  for ((second = 0; second < $1; second++)); do
    if "${@:3}" > /dev/null 2>&1; then return; fi
    sleep 1
  done
  "${engine[@]}" logs "$image" | tail
  fail "$2 within $1 s"
}

choose_engine
choose_base
find_mounts
mkdir "$context"
tar -c --exclude=__pycache__ pyproject.toml constraints.txt .dockerignore vit pipeline configs launch docker tests | tar -x -C "$context"

say "build with ${engine[0]} from $base"
SECONDS=0
build trainer "$image"
echo "$SECONDS s"

say "build again after an edit of the source"
echo "# edited" >> "$context/pipeline/trainer.py"
SECONDS=0
build trainer "$image"
echo "$SECONDS s"
((SECONDS < 60)) || fail "an edit of the source must not install the packages again"

say "preflight"
start --rm --no-healthcheck --shm-size 512m "${volumes[@]}" --entrypoint python3 "$image" -m pipeline.preflight || fail "preflight"

say "healthy before a run; not root"
start --rm --no-healthcheck --entrypoint python3 "$image" docker/health.py || fail "health before a run"
user=$(start --rm --no-healthcheck --entrypoint id "$image" -u)
[[ $user == 10001 ]] || fail "the user is $user, expected 10001"
if start --rm --no-healthcheck --read-only=false --entrypoint touch "$image" pipeline/x 2> /dev/null; then
  fail "the user can change the code"
fi

say "read-only and without privileges, even as root"
# shellcheck disable=SC2016 # the container's shell expands it
start --rm --no-healthcheck --user 0 --entrypoint sh "$image" -c '
  for folder in / /app /app/pipeline /etc /home/trainer /usr/bin; do
    if touch "$folder/x" 2> /dev/null; then echo "$folder is writable"; exit 1; fi
  done
  touch /tmp/x && grep -E "^(Cap|NoNewPrivs)" /proc/1/status' > "$work/status.log" \
  || fail "$(cat "$work/status.log" || true)"
privileges=$(tr -s '[:space:]' ' ' < "$work/status.log")
none=0000000000000000
[[ $privileges == "CapInh: $none CapPrm: $none CapEff: $none CapBnd: $none CapAmb: $none NoNewPrivs: 1 " ]] \
  || fail "privileges: $privileges"

say "any user, with folders of their own"
mkdir -m 777 "$work/data" "$work/runs"
start --rm --no-healthcheck --user 4321:4321 -v "$work/data:/app/data" -v "$work/runs:/app/runs" \
  -v "$image-cache-of-any:/cache" "$image" \
  run.epochs=null run.steps=2 monitor='[jsonl]' engine.zero_stage=1 > "$work/any.log" 2>&1 \
  || { tail "$work/any.log"; fail "a run as any user"; }
[[ -e $work/runs/digits/checkpoints/step-00000002/manifest.json ]] || fail "no checkpoint in a mounted folder"

say "a run on the digits"
timer=()  # podman leaves it to systemd, which may not be there; the check itself is called below
if [[ ${engine[0]} == podman ]]; then timer=(--health-interval disable); fi
start -d --name "$image" "${timer[@]}" --shm-size 512m "${volumes[@]}" "$image" \
  run.epochs=null run.steps=100000 run.log_every_steps=5 checkpoint.every_steps=20 monitor='[jsonl]' \
  > "$work/start.log" 2>&1 || fail "$(cat "$work/start.log" || true)"
wait_until 180 "no checkpoint" "${engine[@]}" exec "$image" sh -c 'ls runs/digits/checkpoints/step-*/manifest.json'
if [[ ${engine[0]} == podman ]]; then
  "${engine[@]}" healthcheck run "$image" || fail "the health check of the image"
else
  "${engine[@]}" exec "$image" python3 docker/health.py || fail "health of a run"
fi
"${engine[@]}" exec -e HEALTH_SECONDS=0 "$image" python3 docker/health.py > /dev/null 2>&1 && fail "a silent run must be unhealthy"
"${engine[@]}" stop -t 60 "$image" > "$work/stop.log" 2>&1
code=$("${engine[@]}" inspect --format '{{.State.ExitCode}}' "$image")
"${engine[@]}" logs "$image" 2>&1 | grep '^saved after step' || fail "the run did not save when it was stopped"
[[ $code == 0 ]] || fail "exit code $code after a stop, expected 0 with a checkpoint saved"

say "resumes when it is started again"
"${engine[@]}" start "$image" > /dev/null
resumed() { "${engine[@]}" logs "$image" 2>&1 | grep '^resuming from'; }
wait_until 120 "no resume" resumed
"${engine[@]}" stop -t 60 "$image" > "$work/stop.log" 2>&1
code=$("${engine[@]}" inspect --format '{{.State.ExitCode}}' "$image")
[[ $code == 0 ]] || fail "exit code $code after the second stop, expected 0"

say "TensorBoard beside it"
"${engine[@]}" rm "$image" > /dev/null
start -d --name "$image" "${timer[@]}" -v "$image-runs:/app/runs:ro" --entrypoint tensorboard "$image" --logdir runs \
  > "$work/start.log" 2>&1 || fail "$(cat "$work/start.log" || true)"
wait_until 60 "no TensorBoard" "${engine[@]}" exec "$image" python3 -c \
  'import urllib.request; urllib.request.urlopen("http://127.0.0.1:6006/data/environment")'
"${engine[@]}" rm -f -t 1 "$image" > /dev/null

say "tests inside of the image"
build test "$image-tests"
start --rm --no-healthcheck --shm-size 512m "$image-tests" tests/pipeline/test_order.py tests/pipeline/test_stream.py \
  tests/pipeline/test_config.py
say "the container works"
