"""A machine of stand-ins for CUDA and TensorRT, and bundles with engines for it."""

from __future__ import annotations

import ctypes

from fake_machine import Machine
from probing import build_folder

VERSIONS = {"tensorrt": "10.15.1.29", "tensorrt-rtx": "1.7.1.116"}  # of the stand-ins


class Place:
    """A machine of stand-ins: bundles get engines, and what the program under test did is counted."""

    def __init__(self, monkeypatch, home, library):
        self.backend = library
        self._python = Machine(monkeypatch, home, rtx=library == "tensorrt-rtx")
        self._python.trt.__version__ = VERSIONS[library]
        self._cuda = ctypes.CDLL(str(build_folder() / "stand_in/libstand_in_cuda.so"))
        self._cuda.stand_in_mistake.restype = ctypes.c_char_p
        self._cuda.stand_in_count.restype = ctypes.c_int64
        self.begin()

    def begin(self, capability=(8, 9), memory=1 << 32, capture=0):
        self._cuda.stand_in_begin(*capability, ctypes.c_size_t(memory), capture)

    def driver(self, error, version=13000):
        self._cuda.stand_in_driver(error, version)

    def with_engines(self, folder, target):
        return self._python.with_engines(folder, target)

    def count(self, what):
        return self._cuda.stand_in_count(what.encode())

    @property
    def mistake(self):
        return self._cuda.stand_in_mistake().decode()
