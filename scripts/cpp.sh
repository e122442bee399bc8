#!/usr/bin/env bash
# Builds the C++ runtime into build/cpp, with its tools and the library of its tests. Arguments go to cmake's
# configuration, e.g. scripts/cpp.sh -DVLMTRIM_SANITIZE=ON. Quick where everything is built.
#
# ONNXRUNTIME_ROOT names a folder with ONNX Runtime's headers (include/) and perhaps its library (lib/); without it the
# headers come from Debian 13's package, unpacked into build/onnxruntime, and the library from the Python wheel.
# VLMTRIM_CPP_BUILD names another build folder. Called with --prepare it only brings what the build needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "cpp.sh: $*" >&2
  exit 1
}

# Debian's package of ONNX Runtime's headers; any mirror of Debian has it.
suite=trixie
mirror=$(sed -n 's/^URIs: *\([^ ]*debian\/\?\) *$/\1/p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -1)
mirror=${mirror:-http://deb.debian.org/debian}

install_packages() {
  local missing=() pair
  for pair in cmake:cmake g++:g++ make:make nlohmann-json3-dev:/usr/include/nlohmann/json.hpp \
    libjpeg-dev:/usr/include/jpeglib.h libpng-dev:/usr/include/png.h libwebp-dev:/usr/include/webp/demux.h; do
    local package=${pair%%:*} proof=${pair#*:}
    case $proof in
    /*) [ -e "$proof" ] || missing+=("$package") ;;
    *) command -v "$proof" >/dev/null || missing+=("$package") ;;
    esac
  done
  ((${#missing[@]})) || return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]} ..." >&2
    apt-get install -y -qq "${missing[@]}" >/dev/null 2>&1 && return
    apt-get update -qq && apt-get install -y -qq "${missing[@]}" >/dev/null && return
  fi
  fail "the C++ runtime needs ${missing[*]}; install with: sudo apt-get install ${missing[*]}"
}

# Headers without installing anything: an apt source of its own, with lists and cache of its own.
fetch_headers() {
  local target=$PWD/build/onnxruntime work
  [ -e "$target/include/onnxruntime/onnxruntime_c_api.h" ] && return
  local advice="give ONNXRUNTIME_ROOT, a folder with ONNX Runtime's include/onnxruntime_c_api.h"
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "no apt-get here to bring ONNX Runtime's headers; $advice"
  echo "downloading ONNX Runtime's headers (Debian $suite, libonnxruntime-dev) ..." >&2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
  local keys=/usr/share/keyrings/debian-archive-keyring.gpg
  [ -e "$keys" ] || fail "no Debian keyring here to check ONNX Runtime's headers with; $advice"
  echo "deb [signed-by=$keys] $mirror $suite main" >"$work/sources.list"
  local options=(-qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none)
  (cd "$work" && apt-get "${options[@]}" update && apt-get "${options[@]}" download libonnxruntime-dev) >/dev/null 2>&1 ||
    fail "ONNX Runtime's headers cannot be downloaded from $mirror; $advice"
  dpkg -x "$work"/libonnxruntime-dev_*.deb "$work/unpacked"
  mkdir -p "$target"
  rm -rf "$target/include"
  mv "$work/unpacked/usr/include" "$target/include"
}

# The library of the Python wheel, where there is one.
wheel_library() {
  python3 - <<'PYTHON' 2>/dev/null || true
import importlib.util, pathlib
spec = importlib.util.find_spec("onnxruntime")
print(*sorted(pathlib.Path(spec.origin).parent.glob("capi/libonnxruntime.so.*"))[:1], sep="")
PYTHON
}

install_packages
options=()
if [ -n "${ONNXRUNTIME_ROOT:-}" ]; then
  options+=("-DONNXRUNTIME_ROOT=$ONNXRUNTIME_ROOT")
else
  fetch_headers
  options+=("-DONNXRUNTIME_ROOT=$PWD/build/onnxruntime")
  library=$(wheel_library)
  [ -z "$library" ] || options+=("-DONNXRUNTIME_LIBRARY=$library")
fi
[ "${1:-}" != --prepare ] || exit 0

build=${VLMTRIM_CPP_BUILD:-build/cpp}
log=$build/build.log
mkdir -p "$build"
{
  cmake -S runtime/cpp -B "$build" -DCMAKE_BUILD_TYPE=Release -DVLMTRIM_TESTS=ON "${options[@]}" "$@" &&
    cmake --build "$build" --parallel "$(nproc)"
} >"$log" 2>&1 || {
  tail -40 "$log" >&2
  fail "the C++ runtime does not build (whole log: $log)"
}
