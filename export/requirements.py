"""Says which extra is missing before an import fails with a stack trace."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

EXPORT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "huggingface_hub", "onnxruntime")


def missing_extra(modules: Sequence[str] = EXPORT) -> str | None:
    """One sentence naming what is not installed, or None."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} not installed; this command needs: pip install 'vlmtrim[export]'"
