#!/usr/bin/env bash
# Build the service's image and use it as an operator would: start it with a read-only root and no capabilities, wait until it is
# healthy, classify, scrape, stop it in the middle of a request. Also lists what is in it (the SBOM) and compares that with the pins.
#
# Needs root and Debian's or Docker's own packages, which it installs when they are missing. It starts a Docker daemon of its own,
# in a folder of its own, with the host's network and no bridge, and leaves nothing behind but build/palisade.spdx.json.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:$PATH

readonly IMAGE=palisade:latest CONTAINER=palisade-check
readonly PYTHON=.venv/bin/python SYFT=.venv/bin/syft

say() { echo "image-check: $*"; }

skip() {
  say "############################################################"
  say "SKIPPED, nothing was built and nothing was checked: $*"
  say "############################################################"
  exit 0
}

install_missing() {
  local missing=() optional
  command -v dockerd >/dev/null || missing+=(docker.io)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  [ "${#missing[@]}" -gt 0 ] || return 0
  apt-get update -q
  if [[ " ${missing[*]} " == *" docker.io "* ]]; then
    for optional in docker-cli docker-buildx; do # parts of docker.io before Debian 13
      ! apt-cache show "$optional" >/dev/null 2>&1 || missing+=("$optional")
    done
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
}

# The daemon's data is large: under TMPDIR, or where there is room.
folder=$(mktemp -d "${TMPDIR:-/var/tmp}/palisade-image-check.XXXXXX")
export DOCKER_HOST="unix://$folder/docker.sock" DOCKER_BUILDKIT=1 DOCKER_CONFIG="$folder/config"
daemon=

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  if [ -n "$daemon" ]; then
    if [ "$status" -ne 0 ]; then
      docker logs "$CONTAINER" 2>&1 | tail -40 || true
      tail -20 "$folder/dockerd.log" || true
    fi
    docker rm --force "$CONTAINER" >/dev/null 2>&1 || true
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
  fi
  # Layers that a daemon left mounted would keep the folder.
  awk -v under="$folder/" 'index($2, under) == 1 {print $2}' /proc/mounts | sort --reverse | xargs --no-run-if-empty umount --lazy
  rm -rf "$folder"
  exit "$status"
}

# start_daemon DRIVER: succeed once the daemon answers, fail if it ends.
start_daemon() {
  rm -rf "$folder/data" "$folder/exec"
  dockerd --iptables=false --ip6tables=false --bridge=none --storage-driver "$1" --data-root "$folder/data" \
    --exec-root "$folder/exec" --pidfile "$folder/docker.pid" --host "$DOCKER_HOST" >"$folder/dockerd.log" 2>&1 &
  daemon=$!
  until docker info >/dev/null 2>&1; do
    if ! kill -0 "$daemon" 2>/dev/null; then
      wait "$daemon" || true
      daemon=
      return 1
    fi
    sleep 0.2
  done
}

# The image that the Dockerfile begins with, pulled or, where there is no registry, made from Debian's packages under its name.
have_base() {
  local base suite
  base=$(sed -n 's/^ARG BASE=//p' docker/service.Dockerfile)
  if timeout 120 docker pull --quiet "$base" >/dev/null 2>"$folder/pull.log"; then
    say "base image: $base, pulled"
    return
  fi
  suite=${base##*-}
  say "base image: $base can't be pulled ($(tail -1 "$folder/pull.log")); made from Debian $suite's packages instead"
  # shellcheck disable=SC2016 # mmdebstrap gives its hooks the folder as $1
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='ln -s /usr/bin/python3 "$1/usr/local/bin/python"' --customize-hook='rm -rf "$1"/var/cache/apt/*' \
    "$suite" "$folder/base.tar"
  docker import "$folder/base.tar" "$base" >/dev/null
  rm "$folder/base.tar"
}

# The certificates and the index that this machine's pip uses; neither ends up in the image.
build() {
  local options=() ca index
  ca=${PIP_CERT:-${SSL_CERT_FILE:-$("$PYTHON" -m pip config get global.cert 2>/dev/null || true)}}
  index=${PIP_INDEX_URL:-$("$PYTHON" -m pip config get global.index-url 2>/dev/null || true)}
  [ -z "$ca" ] || options+=(--secret "id=ca,src=$ca")
  [ -z "$index" ] || options+=(--build-arg "PIP_INDEX_URL=$index")
  docker build --network host --progress plain "${options[@]}" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || true)" \
    --file docker/service.Dockerfile --tag "$IMAGE" . >"$folder/build.log" 2>&1 || {
    tail -60 "$folder/build.log"
    return 1
  }
  say "built $IMAGE: $(docker image inspect --format '{{.Size}}' "$IMAGE") bytes"
  docker history --format '{{.Size}}\t{{.CreatedBy}}' --no-trunc "$IMAGE" | awk -F '\t' '$1 !~ /^0B/ {print "  " $1 "\t" substr($2, 1, 100)}'
}

list_contents() {
  SYFT_CHECK_FOR_APP_UPDATE=false "$SYFT" scan "docker:$IMAGE" --quiet --output spdx-json=build/palisade.spdx.json
  docker run --rm --network none --entrypoint python --volume "$PWD/docker/checks/contents.py:/check.py:ro" "$IMAGE" -I /check.py
  "$PYTHON" docker/checks/bill.py build/palisade.spdx.json requirements/service-cpu.txt
}

free_ports() {
  "$PYTHON" -c 'import socket; held = [socket.create_server(("127.0.0.1", 0)) for _ in "ab"]
print(*(each.getsockname()[1] for each in held))'
}

# As k8s/base runs it, on ports that are free here.
run() {
  local port metrics_port
  read -r port metrics_port < <(free_ports)
  docker run --detach --name "$CONTAINER" --network host --read-only --cap-drop ALL --security-opt no-new-privileges \
    --tmpfs /tmp:size=256m,mode=1777 --memory 1536m \
    --env "PALISADE_PORT=$port" --env "PALISADE_METRICS_PORT=$metrics_port" "$IMAGE" >/dev/null
  "$PYTHON" docker/checks/service.py "$CONTAINER" "http://127.0.0.1:$port" "http://127.0.0.1:$metrics_port/metrics"
}

main() {
  [ "$(id -u)" -eq 0 ] || skip "only root may start a Docker daemon"
  install_missing
  start_daemon overlay2 || start_daemon vfs || {
    cat "$folder/dockerd.log"
    skip "the kernel does not let dockerd start; its log is above"
  }
  say "$(docker info --format 'Docker {{.ServerVersion}}, storage {{.Driver}}')"
  mkdir -p build
  have_base
  build
  list_contents
  run
  say "passed in $SECONDS s"
}

trap clean_up EXIT INT TERM
main
