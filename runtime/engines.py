"""Builds TensorRT and TensorRT-RTX engines from a bundle's ONNX files. The two libraries share one API.

TensorRT-RTX builds ahead of time without a GPU; TensorRT needs the GPU that the engine is for.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtrim.graphs.checksums import sha256
from vlmtrim.graphs.contract import Contract, GraphSpec
from vlmtrim.runtime import profiles as profile_rules
from vlmtrim.runtime.errors import RuntimeRefusal

FINGERPRINTS = "engines.json"
# Library -> (modules that may provide it, extra that installs it).
LIBRARIES = {
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "rtx"),
    "tensorrt": (("tensorrt", "tensorrt_bindings"), "tensorrt"),
}


def import_library(name: str) -> Any:
    """The TensorRT module of that name. Raises RuntimeRefusal naming the package where it is missing."""
    modules, extra = LIBRARIES[name]
    found = next((module for module in modules if importlib.util.find_spec(module) is not None), None)
    if found is None:
        raise RuntimeRefusal(f"{name} is not installed; pip install 'vlmtrim[{extra}]'")
    try:
        return importlib.import_module(found)
    except (ImportError, OSError) as error:
        raise RuntimeRefusal(
            f"{name} is installed ({found}) but does not load: {error}; check that its libraries and the CUDA "
            f"runtime match, or reinstall 'vlmtrim[{extra}]'"
        ) from error


def build_engines(folder: Path, contract: Contract, library: str) -> dict[str, Any]:
    """Build ``vision.engine`` and ``decoder.engine``, or an engine for every piece of their chains.

    Args:
        folder: the bundle, before it is sealed.
        library: ``tensorrt-rtx`` or ``tensorrt``.

    Returns:
        What ``engines.json`` holds: per engine the library, its version, the compute capabilities, the sha256 of
        the ONNX file and the profiles.

    Raises:
        RuntimeRefusal: the library, a GPU it needs, or an operator is missing; the message carries its errors.
    """
    trt = import_library(library)
    fingerprints: dict[str, Any] = {}
    for whole, rules in (("vision", profile_rules.vision_profiles), ("decoder", profile_rules.decoder_profiles)):
        profiles = rules(contract)
        for name in contract.chain(whole):
            fingerprints[f"{name}.engine"] = _build_one(trt, library, folder, name, contract.graphs[name], profiles)
    (folder / FINGERPRINTS).write_text(json.dumps(fingerprints, indent=2) + "\n")
    return fingerprints


def _build_one(
    trt: Any, library: str, folder: Path, name: str, spec: GraphSpec, profiles: Mapping[str, profile_rules.Profile]
) -> dict[str, Any]:
    """Write ``<name>.engine``; returns its fingerprint. The engine is freed before the next one is built."""
    start = time.perf_counter()
    engine, capabilities = _build(trt, library, folder / spec.file, spec, profiles)
    with (folder / f"{name}.engine").open("wb") as stream:
        stream.write(engine)
    size, seconds = len(engine), time.perf_counter() - start
    print(f"{name}.engine: {size / 1e6:.1f} MB in {seconds:.1f} s, {library} {trt.__version__}", file=sys.stderr)
    return {
        "library": library,
        "version": trt.__version__,
        "compute_capabilities": capabilities,
        "onnx_sha256": sha256(folder / spec.file),
        "bytes": size,
        "seconds": round(seconds, 1),
        "profiles": {key: {dim: [r.min, r.opt, r.max] for dim, r in p.items()} for key, p in profiles.items()},
    }


def _build(
    trt: Any, library: str, onnx: Path, spec: GraphSpec, profiles: Mapping[str, profile_rules.Profile]
) -> tuple[memoryview, list[str]]:
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = _create_builder(trt, library, logger, messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise RuntimeRefusal(f"{library} cannot parse {onnx.name}: {errors}")
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    for ranges in profiles.values():
        profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            if tensor.name in inputs:
                profile.set_shape(tensor.name, *profile_rules.shapes(tensor, ranges))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeRefusal(f"{library} cannot build {onnx.name}: {'; '.join(messages[-3:]) or 'no reason given'}")
    return memoryview(engine), _capabilities(config)  # no copy: engines are as large as the weights


def _create_builder(trt: Any, library: str, logger: Any, messages: list[str]) -> Any:
    try:
        return trt.Builder(logger)
    except (RuntimeError, TypeError) as error:
        hint = "; ".join(messages[-2:]) or str(error)
        raise RuntimeRefusal(
            f"{library} cannot start here ({hint}); TensorRT builds on the GPU that the engine is for, "
            "TensorRT-RTX (--engine tensorrt-rtx) builds without one"
        ) from error


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let attention fall back to single operators where no fused kernel exists (float32, head size 16)."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _capabilities(config: Any) -> list[str]:
    count = getattr(config, "num_compute_capabilities", 0)
    return [config.get_compute_capability(i).name for i in range(count)]


def _logger(trt: Any, messages: list[str]) -> Any:
    class Logger(trt.ILogger):
        """Keeps warnings and errors for the message of a refusal."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    return Logger()
