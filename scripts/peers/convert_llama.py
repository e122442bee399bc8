"""llama.cpp's converter, told which pre-tokenizer a random checkpoint has: it knows published ones by their hash.

``convert_llama.py SOURCES ARGUMENTS OF convert_hf_to_gguf.py...``, in llama.cpp's own environment.
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sources = sys.argv.pop(1)
    sys.path.insert(0, sources)
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv[0] = f"{sources}/convert_hf_to_gguf.py"
    runpy.run_path(sys.argv[0], run_name="__main__")
