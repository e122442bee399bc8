#!/usr/bin/env bash
# Sets up a virtual environment, exports a model, asks it about a picture and proves the bundle against PyTorch.
source "$(dirname "$0")/setup.sh"
setup export,rtx
bundle=bundles/demo-fastv-k2-r0.5
picture=export/demo/examples/word.png
question="Which word is written?"

echo "== export-vlm --model demo --k 2 --r 0.5 --dtype float32 =="
export-vlm --model demo --k 2 --r 0.5 --dtype float32 --output "$bundle" --force
echo
echo "== run-vlm: $picture, \"$question\" =="
run-vlm "$bundle" --image "$picture" --prompt "$question"
echo
echo "== check-vlm: the bundle against the unpatched PyTorch model with an independent FastV =="
check-vlm "$bundle" --image "$picture" --prompt "$question"
