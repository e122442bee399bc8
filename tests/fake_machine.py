"""A machine with a GPU and one TensorRT library, both fake."""

from __future__ import annotations

import shutil

import fake_cuda
import fake_tensorrt

from vlmtrim.runtime.backends import cuda, tensorrt
from vlmtrim.runtime.engines import build as engines


class Machine:
    """Puts the fakes in place of cuda-python and the library; ``home`` takes what is kept for the user."""

    def __init__(self, monkeypatch, home, rtx=False):
        self.cuda = fake_cuda.FakeCuda()
        self.trt = fake_tensorrt.make_library(self.cuda, rtx)
        self.library = "tensorrt-rtx" if rtx else "tensorrt"
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.setattr(cuda, "import_runtime", lambda: self.cuda)
        for module in (engines, tensorrt):
            monkeypatch.setattr(module, "find_library", lambda name: name)
            monkeypatch.setattr(module, "import_library", lambda name: self.trt)
        monkeypatch.setattr(engines, "_build", fake_tensorrt.build)

    def with_engines(self, folder, target):
        """A copy of a bundle with engines of this machine."""
        shutil.copytree(folder, target)
        engines.rebuild(target, self.library)
        return target
