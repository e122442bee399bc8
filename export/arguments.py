"""Arguments of export-vlm -> Job, and all that can be refused before torch and transformers take seconds to import."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export.job import FLOAT, Job, Refusal, check_numbers
from vlmtrim.graphs.caches import fields_of, load_policy
from vlmtrim.graphs.contract import IMAGES, PATCHES, TOKENS, VISION, CacheGroup
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.formats import check_block, load_format
from vlmtrim.graphs.methods import load_method, make_method, method_names, parameters
from vlmtrim.graphs.packed import WITHOUT_ENGINES
from vlmtrim.runtime.engines import find_library
from vlmtrim.runtime.errors import RuntimeRefusal

NO_CACHE_POLICY = {
    "pyramid": "says it of its last stage alone",
    "tidal": "reads in all layers the entries that one of them chose",
}
NONE = "none"  # of cache policies
LENGTH_OF_THE_MODEL, LONGEST = 0, 2**31 - 1  # the first stands in a job until the model's config is read


def make_job(args: argparse.Namespace) -> Job:
    """argv -> Job; what was left out is filled in from the method and, for the length, from the model."""
    fields = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Job)}
    fields = {name: value for name, value in fields.items() if value is not None}  # the others have defaults in Job
    if args.max_seq_len is None:
        fields["max_seq_len"] = LENGTH_OF_THE_MODEL
    elif args.max_seq_len < 2:
        raise Refusal(f"--max-seq-len is {args.max_seq_len}; give 2 or more")
    try:
        method = make_method(args.method, **{name: getattr(args, name) for name in parameters(args.method)})
    except ValueError as error:
        raise Refusal(str(error)) from error
    cache = _make_cache(args)
    if args.output == "":
        raise Refusal("--output is empty; give a folder, or leave it out")
    label = method.label if method else "guide" if args.emit_guide else "dense"
    label += "" if args.weights == FLOAT else f"-{args.weights}"
    label += "" if cache is None else f"-{cache.name}"
    fields["keep"] = tuple(args.keep)
    fields["fp32_layers"] = tuple(args.fp32_layers)
    fields["output"] = args.output or default_output(args.model, label)
    fields["eos_token_ids"] = tuple(args.eos_token_ids or ())
    return Job(**{**fields, "method": method, "cache": cache})


def _make_cache(args: argparse.Namespace) -> Any:
    """The cache policy of the arguments; None where they name none."""
    if args.cache == NONE:
        if args.cache_share is not None:
            raise Refusal("--cache-share is of a cache policy; give --cache POLICY as well")
        return None
    policy = load_policy(args.cache)
    try:
        return policy(**{name: getattr(args, f"cache_{name}") for name in fields_of(policy)})
    except ValueError as error:
        raise Refusal(f"--cache {args.cache}: {error}") from error


def default_output(model: str, label: str) -> str:
    """Folder name of a bundle where the user gives none."""
    stem = Path(model).name if Path(model).is_dir() else model.replace(":", "-").replace("/", "--")
    return str(Path("bundles") / f"{stem}-{label}")


def check(job: Job) -> None:
    """Raises Refusal where numbers, names or the model's config say that the job cannot be done."""
    check_numbers(job)
    check_packing(job)
    check_given(job)
    if job.fp32_layers and job.dtype != "float16":
        raise Refusal(f"--fp32-layers are layers of --dtype float16; the dtype is {job.dtype}: leave them out")
    checkpoints.check_name(job.model)
    family, text = _family_and_text(job.model)
    if family is None:
        return
    check_method(job, family)
    layers, positions = text.get("num_hidden_layers"), text.get("max_position_embeddings")
    if isinstance(positions, int) and job.max_seq_len > positions:
        raise Refusal(f"--max-seq-len is {job.max_seq_len}; the model takes 2 to {positions} tokens")
    if isinstance(layers, int) and max(job.fp32_layers, default=0) >= layers:
        raise Refusal(f"--fp32-layers names layer {max(job.fp32_layers)}; the model has layers 0 to {layers - 1}")
    vocabulary = text.get("vocab_size")
    if isinstance(vocabulary, int) and max(job.eos_token_ids, default=0) >= vocabulary:
        raise Refusal(f"--eos-token-id is {max(job.eos_token_ids)}; the model has tokens 0 to {vocabulary - 1}")
    if isinstance(layers, int) and job.method is not None and "cross_attention_layers" not in text:
        try:
            job.method.groups((CacheGroup(tuple(range(layers)), job.max_seq_len or LONGEST, 1, 1),), 0)
        except ValueError as error:
            raise Refusal(str(error)) from error


def check_given(job: Job) -> None:
    """Raises Refusal for files of other exporters that are none, and for what only traced graphs can do."""
    for option, file in (("decoder", job.decoder), ("vision", job.vision), ("embedding", job.embedding)):
        if file is not None and not Path(file).is_file():
            raise Refusal(f"--{option} {file} is no file; give the .onnx of the {option}")
    if job.decoder is not None and (job.packs or job.fp32_layers or job.calibrate):
        raise Refusal(
            "--weights, --fp32-layers and --calibrate are of a decoder that is traced; with --decoder its file says "
            "what its weights are: leave them out"
        )
    if job.vision is None:
        return
    if job.vision_weights != FLOAT:
        raise Refusal("--vision-weights packs a tower that is traced; with --vision its file says: leave it out")
    if job.method is not None and job.method.prunes == PATCHES:
        raise Refusal(
            f"method {job.method.name} works inside a tower that is traced; leave --vision out, or give another method"
        )
    if job.method is not None and getattr(job.method, "guide", None) == VISION:
        raise Refusal(
            f"--score {job.method.score} reads the attention of a tower that is traced; leave --vision out, or give "
            "another score"
        )


def check_packing(job: Job) -> None:
    """Raises Refusal for formats, blocks and dtypes that do not go together."""
    if not job.packs:
        if job.block is not None or job.keep:
            raise Refusal("--block and --keep are of weights in fewer bits; give --weights or --vision-weights as well")
        return
    if job.link_weights:
        raise Refusal(
            "--link-weights links the checkpoint's files, and --weights writes others in fewer bits; leave one of them "
            "out"
        )
    chosen = [name for name in (job.weights, job.head_format, job.vision_weights) if name != FLOAT]
    without = next((name for name in chosen if name in WITHOUT_ENGINES), None)
    if without is not None and job.engine != "none":
        why, instead = WITHOUT_ENGINES[without]
        raise Refusal(f"no engine is built of {without} weights, since {job.engine} {why}; give {instead}")
    if job.block is not None:
        try:
            check_block(chosen[0], job.block)
        except GraphError as error:
            raise Refusal(str(error)) from error
    engines_only = [name for name in chosen if load_format(name).ENGINES_ONLY]
    if engines_only and job.dtype == "float32":
        raise Refusal(
            f"{engines_only[0]} weights are for engines, which multiply them by float16 or bfloat16; give --dtype "
            "float16"
        )


def missing_library(job: Job) -> str | None:
    """Which package is missing of those that the engines need."""
    if job.engine != "none":
        try:
            find_library(job.engine)
        except RuntimeRefusal as error:
            return str(error)
    return None


def check_method(job: Job, family: str) -> None:
    """Raises Refusal where the method does not remove what the family's pictures are made of, or does not emit."""
    if job.emit_guide and job.method is not None:
        raise Refusal(
            f"--emit-guide returns attention to all visual tokens, and method {job.method.name} removes some; give "
            "--method none, and let this bundle guide a larger one (--method guided)"
        )
    if job.emit_guide and IMAGES in checkpoints.prunes(family):
        raise Refusal(
            f"--emit-guide returns attention to visual tokens of the sequence; the pictures of the family {family} are "
            "features of cross-attention, and no guided method takes them"
        )
    _check_cache(job, family)
    if job.method is None or job.method.name in methods_of(family):
        return
    given = " or ".join((*methods_of(family), "none"))
    if (why := checkpoints.without(family).get(job.method.name)) is not None:
        raise Refusal(f"method {job.method.name} is not for the family {family}: it {why}; give --method {given}")
    names = {
        TOKENS: "visual tokens of the sequence",
        PATCHES: "patches that leave the vision tower one for one as visual tokens",
        IMAGES: "image features that cross-attention layers attend to",
    }
    has = names[checkpoints.prunes(family)[0]]
    verb = "is for" if job.method.prunes is None else "removes"
    raise Refusal(
        f"method {job.method.name} {verb} {names[job.method.prunes or TOKENS]}, the pictures of the family {family} "
        f"are {has} (export-vlm --list); give --method {given}"
    )


def _check_cache(job: Job, family: str) -> None:
    """Raises Refusal where a cache policy does not go with the family or the method."""
    if job.cache is None:
        return
    if IMAGES in checkpoints.prunes(family):
        raise Refusal(
            f"--cache {job.cache.name} judges visual tokens of the sequence; the pictures of the family {family} are "
            "features of cross-attention, which --method trimmed-llama cuts before they are cached: leave --cache out"
        )
    if job.emit_guide:
        raise Refusal("--emit-guide and --cache both return what rows attend to; leave one of them out")
    if job.method is not None and job.method.name in NO_CACHE_POLICY:
        raise Refusal(
            f"--cache {job.cache.name} lets layers hold different entries, and method {job.method.name} "
            f"{NO_CACHE_POLICY[job.method.name]}; give --method fastv, zipvl, guided or none"
        )


def methods_of(family: str) -> tuple[str, ...]:
    """Methods that prune what a family has: visual tokens of the sequence, patches, features of cross-attention."""
    prunes = checkpoints.prunes(family)
    others = checkpoints.without(family)
    named = (name for name in method_names() if name not in others)
    return tuple(name for name in named if (load_method(name).prunes or TOKENS) in prunes)


def _family_and_text(model: str) -> tuple[str | None, dict[str, Any]]:
    """A model's family and the raw config of its text model, as far as files at hand tell; hub ids wait."""
    if model.startswith("tiny:"):
        family = model.removeprefix("tiny:")
        return family, {"num_hidden_layers": checkpoints.tiny_layers(family)}
    folder = checkpoints.SHIPPED.get(model, Path(model))
    if not folder.is_dir():
        return None, {}
    raw = checkpoints.read_raw_config(folder)
    text = raw.get("text_config")
    return str(raw.get("model_type")), text if isinstance(text, dict) else {}
