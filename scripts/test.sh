#!/usr/bin/env bash
# Sets up all it needs and passes the tests: lint, types, tests. Arguments go to pytest, e.g. scripts/test.sh -m gpu
source "$(dirname "$0")/setup.sh"
setup export,rtx,test

ruff check .
ruff format --check .
# Type checkers cannot follow setuptools' package-dir mapping; a tree of links shows them the import names.
mkdir -p .typing/vlmtrim
for folder in export graphs runtime; do ln -sfn "../../$folder" ".typing/vlmtrim/$folder"; done
pyright
python -m pytest "$@"
