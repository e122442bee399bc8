"""What the machine is, what it could do at best, and what it has left."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = (
    "vlmtrim",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "tensorrt-rtx-cu13-bindings",
    "cuda-bindings",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Peak:
    """What a device could do at best: bytes a second of its memory, float16 operations a second of its matrix units
    (sums in float32, no sparsity; a multiply-add is two)."""

    bandwidth: float | None
    flops: float | None


# NVIDIA's data sheets; of figures with sparsity, half. Names as nvidia-smi prints them.
PEAKS = {
    "NVIDIA H200": Peak(4.8e12, 989.5e12),
    "NVIDIA H100 80GB HBM3": Peak(3.35e12, 989.5e12),  # SXM5
    "NVIDIA H100 PCIe": Peak(2.0e12, 756e12),
    "NVIDIA A100-SXM4-80GB": Peak(2.039e12, 312e12),
    "NVIDIA A100 80GB PCIe": Peak(1.935e12, 312e12),
    "NVIDIA L40S": Peak(0.864e12, 362e12),
    "NVIDIA L4": Peak(0.3e12, 121e12),
    "NVIDIA GeForce RTX 4090": Peak(1.008e12, 165.2e12),  # Ada architecture white paper, table 2
}


@dataclass(frozen=True)
class Gpu:
    """The first GPU that is visible, as nvidia-smi tells it; ``used`` is in bytes."""

    name: str
    driver: str
    used: int
    sliced: bool

    @property
    def peak(self) -> Peak:
        """From the table; unknown for other devices, and for a slice (MIG) of one."""
        return Peak(None, None) if self.sliced else PEAKS.get(self.name, Peak(None, None))


def gpu() -> Gpu | None:
    """The GPU, or None where nvidia-smi is not there or finds none."""
    fields = "name,driver_version,memory.used,mig.mode.current"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    choice = ["-i", visible] if visible else []
    command = ["nvidia-smi", *choice, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_gpu(done.stdout) if done.returncode == 0 else None


def parse_gpu(text: str) -> Gpu | None:
    """The first line of nvidia-smi's answer; None where it is no answer."""
    parts = [part.strip() for part in text.partition("\n")[0].split(",")]
    if len(parts) != 4 or not parts[2].isdigit():
        return None
    return Gpu(parts[0], parts[1], int(parts[2]) << 20, parts[3] == "Enabled")


def cpu() -> str:
    """Name of the processor and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def return_memory() -> None:
    """Give freed memory back to the system: glibc keeps what large weights leave behind.

    Nothing is collected before: graphs and caches are in no cycle, and a search takes a large program half a second.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_memory() -> int:
    """Bytes of memory that are free for this process: the machine's, or its control group's where that is less."""
    meminfo = Path("/proc/meminfo")
    free = 8 << 30  # where nothing is known
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = (group / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)
