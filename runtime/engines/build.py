"""Builds TensorRT and TensorRT-RTX engines from a bundle's ONNX files. The two libraries share one API.

TensorRT-RTX builds ahead of time without a GPU; TensorRT needs the GPU that the engine is for, so a device builds the
engines of an existing bundle, without PyTorch and without exporting again:

    python -m vlmtrim.runtime.engines BUNDLE --library tensorrt
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmtrim.graphs.bundle import SUMS, BundleError, open_bundle, seal
from vlmtrim.graphs.checksums import sha256
from vlmtrim.graphs.contract import SHIFT, WITHOUT_ENGINES, Contract, GraphSpec
from vlmtrim.runtime.engines import fingerprint, user_cache
from vlmtrim.runtime.engines import profiles as profile_rules
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.progress import running

# Library -> (modules that may provide it, extra that installs it).
LIBRARIES = {
    "tensorrt-rtx": (("tensorrt_rtx", "tensorrt_rtx_bindings"), "rtx"),
    "tensorrt": (("tensorrt", "tensorrt_bindings"), "tensorrt"),
}


def find_library(name: str) -> str:
    """The module that provides a library, not imported yet. Raises RuntimeRefusal naming the missing package."""
    modules, extra = LIBRARIES[name]
    found = next((module for module in modules if importlib.util.find_spec(module) is not None), None)
    if found is None:
        raise RuntimeRefusal(f"{name} is not installed; pip install 'vlmtrim[{extra}]'")
    return found


def import_library(name: str) -> Any:
    """The TensorRT module of that name. Raises RuntimeRefusal naming the package where it is missing or broken."""
    found, extra = find_library(name), LIBRARIES[name][1]
    try:
        return importlib.import_module(found)
    except (ImportError, OSError) as error:
        raise RuntimeRefusal(
            f"{name} is installed ({found}) but does not load: {error}; check that its libraries and the CUDA "
            f"runtime match, or reinstall 'vlmtrim[{extra}]'"
        ) from error


_HINT = (
    "; the checkpoint has zero points, which not every decoder with several selections can be built of: give --method "
    "fastv or none, or more --engine-shards, leave --engine out, or give the checkpoint that is not quantised, with "
    "--weights int4"
)


def build_engines(folder: Path, contract: Contract, library: str) -> dict[str, Any]:
    """Build an engine of every graph, or of every piece of its chain.

    Args:
        folder: the bundle, before it is sealed.
        library: ``tensorrt-rtx`` or ``tensorrt``.

    Returns:
        What ``engines.json`` holds: per engine its :class:`vlmtrim.runtime.engines.fingerprint.Fingerprint`.

    Raises:
        RuntimeRefusal: the library, a GPU it needs, or an operator is missing; the message carries its errors.
    """
    _check_formats(contract, library)
    trt = import_library(library)
    entries: dict[str, Any] = {}
    for whole in contract.wholes:
        rule = profile_rules.shift_profiles if whole.startswith(SHIFT) else profile_rules.cache_profiles
        profiles = RULES.get(whole, rule)(contract)
        for name in contract.chain(whole):
            try:
                entry = _build_one(trt, library, folder, name, contract.graphs[name], profiles)
            except RuntimeRefusal as error:
                if any(kind.format == "int4_sum" for kind in contract.packed):
                    raise RuntimeRefusal(f"{error}{_HINT}") from error
                raise
            entries[f"{name}.engine"] = entry.to_json()
    (folder / fingerprint.FILE).write_text(json.dumps(entries, indent=2) + "\n")
    return entries


def rebuild(folder: str | Path, library: str) -> dict[str, Any]:
    """Build the engines of a finished bundle, in place of those it has, and seal it again.

    The old engines leave the bundle first: whatever ends this early leaves a whole bundle without engines.
    Raises BundleError for a damaged bundle, RuntimeRefusal like :func:`build_engines`.
    """
    import_library(library)
    bundle = open_bundle(folder)
    _check_formats(bundle.contract, library)
    old = [name for name in bundle.sums if name.endswith(".engine") or name == fingerprint.FILE]
    if old:
        kept = "".join(f"{digest}  {name}\n" for name, digest in bundle.sums.items() if name not in old)
        fresh = bundle.file(f".{SUMS}.{os.getpid()}")
        fresh.write_text(kept)
        fresh.replace(bundle.file(SUMS))
        for name in old:
            bundle.file(name).unlink()
    with running(f"engines ({library})"):
        entries = build_engines(bundle.folder, bundle.contract, library)
    with running("checksums") as show:
        seal(bundle.folder, show)
    return entries


def _check_formats(contract: Contract, library: str) -> None:
    """Raise RuntimeRefusal for weights in a format that no engine is built of."""
    for kind in contract.packed:
        if kind.format in WITHOUT_ENGINES:
            why, instead = WITHOUT_ENGINES[kind.format]
            raise RuntimeRefusal(
                f"{library} builds no engine of {kind.format} weights: it {why}; export the checkpoint again with "
                f"{instead.format(library)}"
            )


# Graph -> rule for its profiles; those of a cache policy share theirs.
RULES = {
    "vision": profile_rules.vision_profiles,
    "embed": profile_rules.decoder_profiles,
    "decoder": profile_rules.decoder_profiles,
}


def _build_one(
    trt: Any, library: str, folder: Path, name: str, spec: GraphSpec, profiles: Mapping[str, profile_rules.Profile]
) -> fingerprint.Fingerprint:
    """Write ``<name>.engine``; returns its fingerprint. The engine is freed before the next one is built."""
    start = time.perf_counter()
    symbols = {dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)}
    own = {key: {dim: limits for dim, limits in p.items() if dim in symbols} for key, p in profiles.items()}
    engine, capabilities = _build(trt, library, folder / spec.file, spec, own)
    with (folder / f"{name}.engine").open("wb") as stream:
        stream.write(engine)
    size, seconds = len(engine), time.perf_counter() - start
    print(f"{name}.engine: {size / 1e6:.1f} MB in {seconds:.1f} s, {library} {trt.__version__}", file=sys.stderr)
    onnx_sha256 = sha256(folder / spec.file)
    return fingerprint.Fingerprint(
        library, trt.__version__, tuple(capabilities), onnx_sha256, size, round(seconds, 1), own
    )


def _build(
    trt: Any, library: str, onnx: Path, spec: GraphSpec, profiles: Mapping[str, profile_rules.Profile]
) -> tuple[memoryview, list[str]]:
    messages: list[str] = []
    logger = make_logger(trt, messages)
    builder = _create_builder(trt, library, logger, messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise RuntimeRefusal(f"{library} cannot parse {onnx.name}: {errors}")
    _allow_decomposed_attention(trt, network)
    config = _configure(trt, builder)
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    for ranges in profiles.values():
        profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            if tensor.name in inputs:
                profile.set_shape(tensor.name, *profile_rules.shapes(tensor, ranges))
        config.add_optimization_profile(profile)
    capabilities = _capabilities(config, library)
    timings = _timings_name(trt, capabilities) if library == "tensorrt" else None
    if timings is not None:
        config.set_timing_cache(config.create_timing_cache(user_cache.read(timings)), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeRefusal(f"{library} cannot build {onnx.name}: {'; '.join(messages[-3:]) or 'no reason given'}")
    if timings is not None:
        user_cache.write(timings, bytes(config.get_timing_cache().serialize()))
    return memoryview(engine), capabilities  # no copy: engines are as large as the weights


def _configure(trt: Any, builder: Any) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # a float32 bundle is asked for its precision: TF32 has 10 bits of it
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX cannot be captured in CUDA graphs otherwise
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    return config


def _timings_name(trt: Any, capabilities: Sequence[str]) -> str:
    """TensorRT times kernels while it builds; what it measured holds for one version and one kind of GPU."""
    return f"tensorrt/timing-{trt.__version__}-{'-'.join(capabilities)}.cache"


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


def _capabilities(config: Any, library: str) -> list[str]:
    """Compute capabilities that an engine is built for, as "8.9"; none where it is portable."""
    if library == "tensorrt":
        from vlmtrim.runtime.backends.cuda import Device

        return ["{}.{}".format(*Device().capability)]
    names = [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]
    return [f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM")]


def make_logger(trt: Any, messages: list[str]) -> Any:
    """A logger of the library that keeps warnings and errors for the message of a refusal."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    return Logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the work failed, 2 bad input."""
    p = argparse.ArgumentParser(
        prog="python -m vlmtrim.runtime.engines",
        description="Build the engines of a bundle on this machine, in place of those it has.",
    )
    p.add_argument("bundle", help="bundle folder made by export-vlm")
    p.add_argument("--library", required=True, choices=sorted(LIBRARIES), help="tensorrt needs the GPU they are for")
    args = p.parse_args(argv)
    try:
        rebuild(args.bundle, args.library)
    except (BundleError, RuntimeRefusal) as error:
        print(f"engines: {error}", file=sys.stderr)
        return 2 if isinstance(error, BundleError) else 1
    except OSError as error:
        print(f"engines: {error.strerror or error} ({error.filename})", file=sys.stderr)
        return 1
    return 0
