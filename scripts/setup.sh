#!/usr/bin/env bash
# Sourced by the other scripts: makes a virtual environment with the wanted extras, once, and enters it.
#
#   setup EXTRAS        e.g. setup export,rtx
#
# VLMTRIM_VENV names the environment (default .venv in the repository). pip's own settings apply: to get PyTorch
# without its CUDA packages, point pip at PyTorch's CPU wheels, e.g. with PIP_EXTRA_INDEX_URL.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repository"

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "vlmtrim needs Python 3.11 or later; install it (for example: apt-get install python3 python3-venv)" >&2
  return 1
}

make_environment() {
  local python=$1 folder=$2
  "$python" -m venv "$folder" >/dev/null 2>&1 && return
  rm -rf "$folder"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing python3-venv ..." >&2
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    "$python" -m venv "$folder"
  else
    echo "python cannot make a virtual environment; install it with: sudo apt-get install python3-venv" >&2
    return 1
  fi
}

setup() {
  local extras=$1 folder=${VLMTRIM_VENV:-$repository/.venv} python stamp
  stamp="$folder/.vlmtrim-$(printf '%s' "$extras" | cat - pyproject.toml scripts/constraints.txt | sha256sum | cut -c1-16)"
  if [ ! -f "$stamp" ]; then
    python=$(find_python)
    [ -x "$folder/bin/python" ] || make_environment "$python" "$folder"
    echo "installing vlmtrim[$extras] into $folder ..." >&2
    # The same torch for building and running: pip must not look for a newer one.
    "$folder/bin/pip" install -q --disable-pip-version-check -c scripts/constraints.txt -e ".[$extras]"
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  source "$folder/bin/activate"
}
