#!/usr/bin/env bash
# Sets up a virtual environment, exports a model, asks it about a picture and proves the bundle against PyTorch.
source "$(dirname "$0")/setup.sh"
setup export,rtx
bundle=bundles/tiny-llava-fastv-k2-r0.5

echo "== export-vlm --model tiny:llava --k 2 --r 0.5 =="
export-vlm --model tiny:llava --k 2 --r 0.5 --engine tensorrt-rtx --dtype float16 --output "$bundle" --force
echo
echo "== run-vlm: a question about tests/data/shapes.png (the weights are random, so the answer is noise) =="
run-vlm "$bundle" --image tests/data/shapes.png --prompt "What is in the picture?" --max-new-tokens 24
echo
echo "== check-vlm: the bundle against the unpatched PyTorch model with an independent FastV =="
check-vlm "$bundle" --image tests/data/shapes.png --prompt "What is in the picture?"
