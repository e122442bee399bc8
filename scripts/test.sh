#!/usr/bin/env bash
# Sets up all it needs and passes the tests: lint, types, the C++ runtime, a browser, tests. Arguments go to pytest, e.g. scripts/test.sh -m gpu -n 0
source "$(dirname "$0")/setup.sh"
setup export,rtx,peers,test

ruff check .
ruff format --check .
# Type checkers cannot follow setuptools' package-dir mapping; a tree of links shows them the import names.
mkdir -p .typing/vlmtrim
for folder in export graphs runtime; do ln -sfn "../../$folder" ".typing/vlmtrim/$folder"; done
pyright
scripts/cpp.sh
scripts/browser.sh
# A test file stays on one worker, so that its fixtures are made once, the longest first (tests/conftest.py); -n 0 runs
# all in one process (GPU tests).
# A whole run also compares README's table of what is proven with what it proves (--proven write writes it).
(($#)) || set -- --proven check
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
