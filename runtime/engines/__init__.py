"""TensorRT and TensorRT-RTX engines: building them, their profiles, and what they were made for.

Of an existing bundle, on the machine that they are for:

    python -m vlmtrim.runtime.engines BUNDLE --library tensorrt
"""

from vlmtrim.runtime.engines.build import build_engines, find_library, import_library, make_logger, rebuild

__all__ = ["build_engines", "find_library", "import_library", "make_logger", "rebuild"]
