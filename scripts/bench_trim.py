"""Time and memory of trim-onnx, and of what export-vlm --decoder does, on a decoder of 7B.

It has 32 layers of Llama-2's sizes, and weights of that size on disk. Of --decoder: reading, our contract's form, the
selection, linking the weights, writing.

The decoder is made by hand in the form that mobius-onnx writes (Attention with past and present, residuals in norms) or
onnxruntime-genai's (GroupQueryAttention, packed); its external data is a sparse file, of which nothing is read but for
--copy, which reads its zeros and writes them.
Every repetition is a process of its own: seconds, seconds of CPU, and its largest resident memory.

scripts/bench_trim.py --repeat 3
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.ops import Ops

LAYERS, WIDTH, INNER, HEADS, SIZE, VOCABULARY, MOST = 32, 4096, 11008, 32, 128, 32000, 4096
KIND = ir.DataType.FLOAT16
FORMS = ("attention", "group-query")


class Sparse:
    """External weights one after the other in a file that is all hole."""

    def __init__(self, path: Path):
        self.path, self.end, self.values = path, 0, []

    def __call__(self, name: str, *shape: int) -> ir.Value:
        """A float16 initializer."""
        length = 2 * int(np.prod(shape))
        place = {"shape": ir.Shape(shape), "name": name, "base_dir": self.path.parent}
        tensor = ir.ExternalTensor(self.path.name, self.end, length, KIND, **place)
        self.end += length
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(KIND), shape=ir.Shape(shape))
        self.values.append(value)
        return value


class Builder(Ops):
    """Layers in one of the forms."""

    def __init__(self, form: str, weight: Sparse):
        super().__init__("m")
        self.form, self.weight, self.present = form, weight, []
        self.embeds = ir.val("inputs_embeds", dtype=KIND, shape=("B", "S", WIDTH))
        self.mask = ir.val("attention_mask", dtype=ir.DataType.INT64, shape=("B", "T"))
        self.positions = ir.val("position_ids", dtype=ir.DataType.INT64, shape=("B", "S"))
        shape = ("B", HEADS, "P", SIZE)
        names = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
        self.past = [ir.val(name, dtype=KIND, shape=shape) for name in names]
        self.tables = [weight(name, MOST, SIZE // 2) for name in ("cos_cache", "sin_cache")]

    def microsoft(self, operator: str, *inputs: ir.Value | None, outputs: int, **attributes: float) -> list[ir.Value]:
        """A node of com.microsoft."""
        node = ir.node(operator, inputs, attributes=attributes, num_outputs=outputs, domain="com.microsoft")
        node.name = f"m/{operator}_{len(self.nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def shared(self) -> list[ir.Value]:
        """Mask and tables, or lengths."""
        if self.form == "group-query":
            last = self("Sub", self("ReduceSum", self.mask, self.const([1]), keepdims=0), self.const([1]))
            total = self("Gather", self("Shape", self.mask), self.const(1))
            return [self("Cast", value, to=ir.DataType.INT32) for value in (last, total)]
        shape = self.concat(self.dim(self.embeds, 0), self.const([1]), self.dim(self.embeds, 1), self.dim(self.mask, 1))
        real = self("Unsqueeze", self("Cast", self.mask, to=ir.DataType.BOOL), self.const([1, 2]))
        seen = self("Expand", real, shape)
        seen.type, seen.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape(("B", 1, "S", "T"))
        return [seen, *(self("Gather", table, self.positions) for table in self.tables)]

    def attention(self, layer: int, normed: ir.Value, shared: list[ir.Value]) -> ir.Value:
        """Attention of a layer, whose caches it returns."""
        pair, weight = self.past[2 * layer : 2 * layer + 2], self.weight
        if self.form == "attention":
            q, k, v = (_typed(self("MatMul", normed, weight(f"{layer}.{name}", WIDTH, WIDTH))) for name in "qkv")
            q, k = (_typed(self("RotaryEmbedding", part, *shared[1:], num_heads=HEADS)) for part in (q, k))
            heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "is_causal": 1, "scale": SIZE**-0.5}
            y, *new = self("Attention", q, k, v, shared[0], *pair, outputs=3, **heads)
        else:
            qkv = _typed(self("MatMul", normed, weight(f"{layer}.qkv", WIDTH, 3 * WIDTH)), 3 * WIDTH)
            heads = {"num_heads": HEADS, "kv_num_heads": HEADS, "do_rotary": 1, "scale": SIZE**-0.5}
            given = [qkv, None, None, *pair, *shared, *self.tables]
            y, *new = self.microsoft("GroupQueryAttention", *given, outputs=3, **heads)
        for name, value in zip(("key", "value"), new, strict=True):
            value.name, value.type = f"present.{layer}.{name}", ir.TensorType(KIND)
            value.shape = ir.Shape(("B", HEADS, "T", SIZE))
        self.present += new
        return _typed(self("MatMul", y, weight(f"{layer}.o", WIDTH, WIDTH)))

    def mlp(self, layer: int, normed: ir.Value) -> ir.Value:
        """Gate, up and down."""
        gate, up = (self("MatMul", normed, self.weight(f"{layer}.{name}", WIDTH, INNER)) for name in ("gate", "up"))
        inner = self("Mul", self("Mul", gate, self("Sigmoid", gate)), up)
        return _typed(self("MatMul", inner, self.weight(f"{layer}.down", INNER, WIDTH)))

    def norm(self, residual: ir.Value, added: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum)."""
        weight = self.weight(name, WIDTH)
        if added is None:
            return self("SimplifiedLayerNormalization", residual, weight, axis=-1, epsilon=1e-5), residual
        operator = "SkipSimplifiedLayerNormalization"
        outputs = self.microsoft(operator, residual, added, weight, outputs=4, epsilon=1e-5)
        return outputs[0], outputs[3]


def write(folder: Path, form: str) -> Path:
    """The decoder and its weights."""
    weight = Sparse(folder / "model.onnx.data")
    b = Builder(form, weight)
    residual, added, shared = b.embeds, None, b.shared()
    for layer in range(LAYERS):
        normed, residual = b.norm(residual, added, f"{layer}.norm1")
        added = b.attention(layer, normed, shared)
        normed, residual = b.norm(residual, added, f"{layer}.norm2")
        added = b.mlp(layer, normed)
    logits = b("MatMul", b.norm(residual, added, "norm")[0], weight("head", WIDTH, VOCABULARY))
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(KIND), ir.Shape(("B", "S", VOCABULARY))
    inputs = [b.embeds, b.mask, *([b.positions] if form == "attention" else []), *b.past]
    parts = {"nodes": b.nodes, "initializers": weight.values, "opset_imports": {"": 23, "com.microsoft": 1}}
    graph = ir.Graph(inputs, [logits, *b.present], name="decoder", **parts)
    with weight.path.open("wb") as file:
        file.truncate(weight.end)
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


def _typed(value: ir.Value, width: int = WIDTH) -> ir.Value:
    value.type, value.shape = ir.TensorType(KIND), ir.Shape(("B", "S", width))
    return value


def into_bundle(decoder: Path, link: bool) -> None:
    """The stages of export-vlm --decoder that work on the decoder, into a folder beside it."""
    from vlmtrim.export import given, given_weights
    from vlmtrim.graphs import FastV
    from vlmtrim.graphs.boundary import decoder_spec
    from vlmtrim.graphs.contract import CacheGroup
    from vlmtrim.graphs.lint import lint
    from vlmtrim.graphs.passes.last_row import last_row

    groups = (CacheGroup(tuple(range(LAYERS)), MOST, HEADS, SIZE),)
    spec = decoder_spec(dtype="float16", hidden=WIDTH, vocabulary=VOCABULARY, groups=groups, selects=False)
    with tempfile.TemporaryDirectory(dir=decoder.parent) as scratch:
        model = last_row(given.read_decoder(str(decoder), spec))
        lint(model, spec)
        FastV(k=2, r=0.5)(model, visual_tokens=576)
        given_weights.store(model, "decoder", Path(scratch), lambda *_: None, link=link)
        ir.save(model, Path(scratch) / "decoder.onnx")


def measure(command: list[str]) -> tuple[float, float, float]:
    """(seconds, seconds of CPU, GB of resident memory at most) of a command in a process of its own."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    watched = (
        "import resource, subprocess, sys\n"
        "status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", watched, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, int(done.stdout) * 1024 / 1e9


def main() -> int:
    """Print two lines for each form; exit 1 where trim-onnx takes more than 10 s of CPU or 0.5 GB."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeat", type=int, default=3, help="runs, of which the medians are printed (default 3)")
    p.add_argument("--into-bundle", type=Path, metavar="DECODER", help="do what is measured of --decoder, and no more")
    p.add_argument("--copy", action="store_true", help="also measure weights that are copied, which writes all of them")
    args = p.parse_args()
    if args.into_bundle:
        into_bundle(args.into_bundle, not args.copy)
        return 0
    fine = True
    print(f"{'form':14}{'command':14}{'weights':>10}{'seconds':>10}{'CPU s':>8}{'memory':>9}")
    for form in FORMS:
        with tempfile.TemporaryDirectory() as scratch:
            decoder = write(Path(scratch), form)
            data = decoder.with_name("model.onnx.data").stat().st_size / 1e9
            trim = ["-m", "vlmtrim.graphs.foreign.cli", str(decoder), str(decoder.with_name("trimmed.onnx"))]
            commands = {
                "trim-onnx": [*trim, "--k", "2", "--r", "0.5", "--force"],
                "--decoder": [__file__, "--into-bundle", str(decoder)],
            }
            if args.copy and form == FORMS[0]:  # the form does not matter to it
                commands["copied"] = [__file__, "--into-bundle", str(decoder), "--copy"]
            for name, command in commands.items():
                runs = [measure([sys.executable, *command]) for _ in range(args.repeat)]
                seconds, cpu, memory = (statistics.median(column) for column in zip(*runs, strict=True))
                fine &= name != "trim-onnx" or (cpu <= 10 and memory <= 0.5)
                print(f"{form:14}{name:14}{data:7.1f} GB{seconds:10.1f}{cpu:8.1f}{memory:6.2f} GB")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
