"""The inside of the C++ runtime for tests: builds it once, and calls probe.cpp through ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np

from vlmtrim.runtime.video import Video

ROOT = Path(__file__).resolve().parents[2]


class ProbeError(Exception):
    """A sentence of the C++ runtime."""


@cache
def build_folder() -> Path:
    """Where the C++ runtime is built, after it was; workers wait for each other."""
    folder = ROOT / os.environ.get("VLMTRIM_CPP_BUILD", "build/cpp")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([ROOT / "scripts/cpp.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@cache
def library():
    loaded = ctypes.CDLL(str(build_folder() / "libvlmtrim_probe.so"))
    loaded.probe_result.restype = ctypes.c_void_p
    loaded.probe_open.restype = ctypes.c_void_p
    return loaded


def result(name: str) -> bytes:
    size = ctypes.c_size_t()
    place = library().probe_result(name.encode(), ctypes.byref(size))
    return ctypes.string_at(place, size.value) if place else b""


def array(name: str, dtype) -> np.ndarray:
    return np.frombuffer(result(name), dtype)


def record() -> dict:
    return json.loads(result("json"))


def call(name: str, *args) -> None:
    """Raises ProbeError with the sentence of a function that failed."""
    if not getattr(library(), name)(*args):
        raise ProbeError(result("error").decode(errors="replace"))


def pointer(values: np.ndarray):
    return values.ctypes.data_as(ctypes.c_void_p)


def decoded(data: bytes) -> np.ndarray:
    """The pixels of a picture's file, uint8 [H, W, 3]."""
    call("probe_picture", data, ctypes.c_size_t(len(data)))
    height, width = array("size", np.int64)
    return array("rgb", np.uint8).reshape(height, width, 3)


def resized(pixels: np.ndarray, size: tuple[int, int], resample: int, box=None) -> np.ndarray:
    """uint8 [H, W, 3] at ``size`` (width, height)."""
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    given = None if box is None else (ctypes.c_float * 4)(*box)
    call("probe_resize", pointer(pixels), width, height, *size, resample, given)
    return array("rgb", np.uint8).reshape(size[1], size[0], 3)


class Native:
    """A bundle opened in C++, one conversation."""

    def __init__(self, folder: Path, exact: bool = False, backend: str = "ort-cpu", cuda_graphs: str = "auto"):
        self._opened = library().probe_open(str(folder).encode(), backend.encode(), cuda_graphs.encode(), int(exact))
        if not self._opened:
            raise ProbeError(result("error").decode(errors="replace"))
        self._handle = ctypes.c_void_p(self._opened)

    def close(self):
        library().probe_close(self._handle)

    def reset(self):
        call("probe_reset", self._handle)

    def cut(self, share: float = -1.0, every: int = 0):
        """How a cache policy cuts from now on."""
        call("probe_caches", self._handle, ctypes.c_double(share), ctypes.c_int64(every))

    def sum_attention(self):
        """Sums what visual tokens receive from now on, where the bundle returns it."""
        call("probe_sum_attention", self._handle)

    def received(self) -> np.ndarray:
        """What the visual tokens of the last step with any have received since, float32 [N]."""
        call("probe_received", self._handle)
        return array("received", np.float32)

    def process(self, images) -> dict:
        """What the processor makes of Pillow pictures, and of videos of them: inputs by name, tokens, grids, words."""
        videos = [image if isinstance(image, Video) else Video([image], 0) for image in images]
        pixels = np.concatenate([np.asarray(frame).reshape(-1) for video in videos for frame in video.frames])
        sizes = [(video.frames[0].height, video.frames[0].width, len(video.frames)) for video in videos]
        fps = np.array([video.fps for video in videos])
        call("probe_process", self._handle, pointer(pixels), pointer(np.int32(sizes)), pointer(fps), len(videos))
        said = record()
        inputs = {
            name: array(name, tensor["dtype"]).reshape(tensor["shape"]) for name, tensor in said["inputs"].items()
        }
        return {
            "inputs": inputs,
            "tokens": array("tokens", np.int64).tolist(),
            "grids": said["grids"],
            "words": said["words"],
        }

    def prefill(self, ids, pictures=None, guide=None) -> dict:
        """``pictures`` as Python's processor makes them. Returns what the prefill did, arrays by name."""
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        described, data = None, None
        if pictures is not None:
            inputs = {name: np.ascontiguousarray(pictures.inputs[name]) for name in sorted(pictures.inputs)}
            tensors = {name: {"shape": v.shape, "dtype": v.dtype.name} for name, v in inputs.items()}
            described = json.dumps({"tokens": pictures.tokens, "grids": pictures.grids, "inputs": tensors}).encode()
            data = (ctypes.c_void_p * len(inputs))(*(v.ctypes.data for v in inputs.values()))
        scores = None if guide is None else np.ascontiguousarray(guide, dtype=np.float32)
        count = ctypes.c_size_t(0 if scores is None else scores.size)
        given = None if scores is None else pointer(scores)
        call("probe_prefill", self._handle, pointer(ids), ctypes.c_size_t(len(ids)), described, data, given, count)
        found = record()
        found["logits"] = array("logits", np.float32)
        found["entries"] = array("entries", np.int64)
        for name, dtype in (("kept_indices", np.int64), ("kept_features", np.int64), ("visual_scores", np.float32)):
            found[name] = array(name, dtype)
        return found

    def decode(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """(logits, entries of the cache groups)."""
        call("probe_decode", self._handle, ctypes.c_int64(token))
        return array("logits", np.float32), array("entries", np.int64)
