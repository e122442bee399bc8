"""Environments, conversions and exports of every peer, made in a work folder where they are not there yet."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OPENVINO = (
    "openvino-genai==2026.4.1.0",
    "optimum-intel==2.2.0",
    "nncf==3.4.0",
    "transformers==4.57.6",
    "torch==2.13.0",
)
LLAMA_SOURCES = "llama-cpp-python==0.3.36"
LLAMA = ("torch==2.13.0", "transformers==4.57.6", "sentencepiece", "safetensors", "protobuf", "cmake", "ninja")
SERVER = ("UI", "TESTS", "EXAMPLES", "APP")  # what of llama.cpp is not built


class Skip(Exception):
    """A peer that does not work here, and why, in a line."""


@dataclass(frozen=True)
class Subject:
    """A peer with one kind of weights: a driver, what it loads, and the prunings it is asked for.

    Attributes:
        peer, weights: names in the table.
        driver: file beside this one.
        python: interpreter that runs it.
        load: request that loads it.
        prunings: label -> what is added to an ask.
    """

    peer: str
    weights: str
    driver: str
    load: dict[str, Any]
    python: str = sys.executable
    prunings: dict[str, dict[str, Any]] = field(default_factory=lambda: {"-": {}})


def run(*command: str | Path, log: Path, **environment: str) -> None:
    """A command with its output in a log. Raises Skip."""
    shown = shlex.join(map(str, command))
    print(f"+ {shown}", file=sys.stderr, flush=True)
    with log.open("a") as out:
        done = subprocess.run(
            [str(part) for part in command], stdout=out, stderr=out, env={**os.environ, **environment}
        )
    if done.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise Skip(f"{Path(str(command[0])).name} failed ({log.name}): {''.join(last)[:200]}")


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made under another name first, so that what is there is whole."""
    if not target.exists():
        building = target.with_name("making-" + target.name)
        if building.is_dir():
            shutil.rmtree(building)
        make(building)
        building.rename(target)
    return target


def environment(work: Path, name: str, packages: tuple[str, ...]) -> Path:
    """Python of a virtual environment with exactly these requests installed."""
    folder, log = work / f"env-{name}", work / f"{name}.log"
    python, stamp = folder / "bin/python", folder / "requested"
    if not stamp.is_file() or stamp.read_text() != "\n".join(packages):
        run(sys.executable, "-m", "venv", folder, log=log)
        run(python, "-m", "pip", "install", "--quiet", *packages, log=log)
        stamp.write_text("\n".join(packages))
    return python


def checkpoint(work: Path, layers: int, depth: int) -> Path:
    """The random model; in a process of its own, whose memory is given back."""
    code = "import sys, pathlib, checkpoint; checkpoint.write(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))"
    target = work / f"model-{layers}-{depth}"
    log = work / "model.log"

    def make(folder: Path) -> None:
        run(sys.executable, "-c", code, folder, str(layers), str(depth), log=log, PYTHONPATH=_paths())

    return once(target, make)


def ours(work: Path, model: Path, name: str, arguments: str) -> list[Subject]:
    """A bundle of this checkout, exported anew each time."""
    words = shlex.split(arguments)
    given = dict(zip(words, [*words[1:], ""], strict=True))
    target = work / f"ours-{name}"
    export = (sys.executable, "-m", "vlmtrim.export.cli", "--model", model, "--output", target, "--force")
    shape = ("--dtype", "float32", "--max-seq-len", "2048")
    linked = () if "--weights" in words or "--vision-weights" in words else ("--link-weights",)
    run(*export, *shape, *linked, *words, log=work / f"ours-{name}.log", PYTHONPATH=_paths())
    pruned = "-" if given.get("--method") == "none" else f"{100 * float(given.get('--r', 0.5)):.0f} %"
    load = {"bundle": str(target), "packages": ["onnxruntime"]}
    return [Subject("ours", given.get("--weights", "float32"), "drive_ours.py", load, prunings={pruned: {}})]


def pytorch(work: Path, model: Path) -> list[Subject]:
    """In this interpreter's environment: exports need PyTorch anyway."""
    return [
        Subject(
            "PyTorch SDPA",
            "float32",
            "drive_torch.py",
            {"checkpoint": str(model), "packages": ["torch", "transformers"]},
        )
    ]


def openvino(work: Path, model: Path) -> list[Subject]:
    """Float IR by optimum-cli; 8 and 4 bits out of it."""
    log = work / "openvino.log"
    python = environment(work, "openvino", OPENVINO)
    vision = [str(python), "-c", "import importlib.util as u; u.find_spec('torchvision') and __import__('torchvision')"]
    if subprocess.run(vision, capture_output=True).returncode:  # one for CUDA beside a PyTorch for CPUs; not needed
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", log=log)
    offline = {"HF_HUB_OFFLINE": "1"}
    export = (python.with_name("optimum-cli"), "export", "openvino", "--model", model, "--task", "image-text-to-text")
    label = model.name.removeprefix("model-")
    whole = once(
        work / f"openvino-fp32-{label}",
        lambda folder: run(*export, "--weight-format", "fp32", folder, log=log, **offline),
    )

    def quantized(bits: str) -> Path:
        script = HERE / "convert_openvino.py"
        return once(
            work / f"openvino-int{bits}-{label}",
            lambda folder: run(python, script, whole, folder, bits, log=log, **offline),
        )

    prunings = {"-": {}, "50 %": {"pruned": 50}, "75 %": {"pruned": 75}}

    def subject(weights: str, folder: Path, precision: str | None, kinds: dict[str, dict[str, Any]]) -> Subject:
        load = {"model": str(folder), "precision": precision, "packages": ["openvino", "openvino-genai"]}
        return Subject("OpenVINO GenAI", weights, "drive_openvino.py", load, str(python), kinds)

    return [
        subject("float32", whole, "f32", prunings),
        subject("float32, its own precision", whole, None, {"-": {}}),
        subject("int8", quantized("8"), None, prunings),
        subject("int4", quantized("4"), None, prunings),
    ]


def llama(work: Path, model: Path) -> list[Subject]:
    """llama.cpp out of llama-cpp-python's source archive: built, its server alone; text models and tower in GGUF."""
    log = work / "llama.log"
    python = environment(work, "llama", LLAMA)

    def unpack(folder: Path) -> None:
        pip = (python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python")
        run(*pip, "-d", work / "archives", LLAMA_SOURCES, log=log)
        archive = next((work / "archives").glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")

    unpacked = once(work / "llama-sources", unpack)
    sources = next(unpacked.glob("*/vendor/llama.cpp"))
    build = work / "llama-build"
    if not (build / "bin/llama-server").is_file():
        cmake = python.with_name("cmake")
        off = [f"-DLLAMA_BUILD_{part}=OFF" for part in SERVER]
        off += ["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DBUILD_SHARED_LIBS=OFF"]
        run(cmake, "-S", sources, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *off, log=log)
        jobs = ("-j", str(os.cpu_count() or 1))
        run(cmake, "--build", build, *jobs, "--target", "llama-server", "llama-quantize", log=log)
    label = model.name.removeprefix("model-")
    convert = (python, HERE / "convert_llama.py", sources, model, "--outtype", "f16")
    text = once(work / f"text-{label}-F16.gguf", lambda file: run(*convert, "--outfile", file, log=log))
    tower = once(work / f"tower-{label}-F16.gguf", lambda file: run(*convert, "--mmproj", "--outfile", file, log=log))

    def quantized(kind: str) -> Path:
        tool = build / "bin/llama-quantize"
        return once(work / f"text-{label}-{kind}.gguf", lambda file: run(tool, text, file, kind, "2", log=log))

    subjects = []
    for kind, file in (("F16", text), ("Q8_0", quantized("Q8_0")), ("Q4_0", quantized("Q4_0"))):
        load = {
            "server": str(build / "bin/llama-server"),
            "text": str(file),
            "mmproj": str(tower),
            "packages": [],
            "versions": {"llama.cpp in llama-cpp-python": LLAMA_SOURCES.partition("==")[2]},
        }
        name = kind if kind == "F16" else f"{kind}, tower F16"
        subjects.append(Subject("llama.cpp", name, "drive_llama.py", load, sys.executable))
    return subjects


def _paths() -> str:
    """Where drivers and exports find modules: beside this file, and what this interpreter was told."""
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
