"""bench-vlm: what is counted equals what other programs count; arithmetic; nothing unknown is printed."""

import json
import math
import shutil

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, MllamaForConditionalGeneration

from vlmtrim.export.checkpoint import load_reference
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import bench_cli
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure import bench, machine
from vlmtrim.runtime.measure.bench_table import table
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.measure.machine import Peak
from vlmtrim.runtime.measure.watch import watch
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session


def test_multiply_adds_are_what_torch_counts(dense_bundle, fastv_bundle):
    """torch's own counter over the unpatched model with eager attention, dense and with tokens gathered away."""
    ids = [256, 5, *[259] * 16, *range(40, 60)]
    for folder in (dense_bundle, fastv_bundle):
        contract = open_bundle(folder).contract
        selection = None if contract.selection is None else dict(contract.selection)
        reference = Reference(LlavaForConditionalGeneration, folder, selection)
        turn = Turn("t", ids, (generated_picture(0),))
        flops = layer_flops(reference, turn)
        assert contract.prefill_macs(len(ids), 16) - contract.macs.logits == flops / 2


def test_multiply_adds_of_cross_attention_are_what_torch_counts(export_tiny):
    """Dense, and with every union cut to a quarter, so that later layers take as many features as the caches may."""
    for fields in ({"method": "none"}, {"method": "trimmed-llama", "ratio": 0.25, "bound": 0.25}):
        folder = export_tiny(f"macs-{fields['method']}", family="mllama", **fields)
        contract = open_bundle(folder).contract
        selection = None if contract.selection is None else dict(contract.selection)
        reference = load_reference("mllama")(MllamaForConditionalGeneration, folder, selection)
        flops = layer_flops(reference, Turn("t", [256, 259, *range(40, 60)], (generated_picture(0),)))
        assert contract.prefill_macs(22, 68) - contract.macs.logits == flops / 2


def layer_flops(reference, turn):
    """Floating-point operations that PyTorch counts in the decoder layers while a turn is prefilled; of the last layer
    those of one row, and the keys and values of all.
    """
    counts = []

    def start(*_):
        counts.append(FlopCounterMode(display=False))
        counts[-1].__enter__()

    for layer in reference.model.model.language_model.layers:
        layer.register_forward_pre_hook(start)
        layer.register_forward_hook(lambda *_: counts[-1].__exit__(None, None, None))
    last = reference.model.model.language_model.layers[-1]
    attention = last.cross_attn if hasattr(last, "cross_attn") else last.self_attn
    rows, keys = [], []
    last.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[-2]))
    attention.k_proj.register_forward_pre_hook(lambda _, args: keys.append(args[0].numel() // args[0].shape[-1]))
    reference.record(turn, 0)
    *others, whole = (count.get_total_flops() for count in counts)
    written = 2 * keys[0] * (attention.k_proj.weight.numel() + attention.v_proj.weight.numel())
    return sum(others) + written + (whole - written) // rows[0]


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_bytes_of_a_step_are_the_matrices_and_the_filled_caches(export_tiny, fastv_bundle, family):
    """Without the matrices of keys and values where a layer attends to pictures, which are there already."""
    cross = family == "mllama"
    bundle = open_bundle(export_tiny("bytes", family=family, method="trimmed-llama") if cross else fastv_bundle)
    decoder = ir.load(bundle.file("decoder.onnx"))
    unread = ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")
    weights = [v for name, v in decoder.graph.initializers.items() if not name.endswith(unread)]
    matrices = [v.const_value for v in weights if len(v.const_value.shape) == 2]
    stored = sum(value.nbytes for value in matrices if isinstance(value, ir.ExternalTensor))
    session = Session(bundle, make_backend("ort-cpu"))
    session.prefill([[256, *[259] * (1 if cross else 16), 40, 41]], session.processor([generated_picture(0)]))
    session.decode(np.array([7]))
    filled = sum(array.nbytes for pair in session.cache_contents(0) for array in pair)
    entries = [int(length.max()) for length in session.lengths.entries]
    assert bundle.contract.step_bytes(entries) == stored + filled


def test_caches_take_what_the_contract_says(fastv_bundle):
    bundle, backend = open_bundle(fastv_bundle), make_backend("ort-cpu")
    session = Session(bundle, backend, batch=2)
    held = sum(backend.to_host(value).nbytes for value in session.caches.values())
    assert backend.memory() == {"caches": held}
    assert held == sum(group.nbytes(2, "float32") for group in bundle.contract.groups)
    del session
    assert backend.memory() == {"caches": 0}


def sample(prefill, decode, sizes):
    return bench.Sample(0.01, 0.001, prefill, decode, prefill + 0.02, sum(decode) / len(decode), 0.0, 0, sizes)


def test_rates_and_spread():
    one = sample(0.5, [0.1, 0.2, 0.4], [100, 200, 300])
    assert one.bandwidth == 1000  # of 1000, 1000 and 750 bytes a second
    assert one.metrics()["decode"] == 0.2
    found = bench.summary([one.metrics(), sample(0.3, [0.1, 0.1], None).metrics()])
    assert found["prefill"] == {"median": 0.4, "min": 0.3, "max": 0.5}
    assert found["bandwidth"] == {"median": 1000, "min": 1000, "max": 1000}
    assert bench.summary([sample(0.3, [0.1], None).metrics()])["bandwidth"] is None
    assert bench.share(None, 2.0) is None and bench.share(1.0, None) is None and bench.share(1.0, 4.0) == 0.25


def test_ratios_are_of_the_same_round():
    """Both bundles slow down together from round to round; the ratio does not."""

    class Fake:
        ids, visual = [1, 2, 3], 2

        def __init__(self, seconds, macs):
            self.samples = [sample(s, [s / 10], [macs]) for s in seconds]
            self.contract = type("C", (), {"prefill_macs": lambda self, tokens, visual: macs * tokens})()

    found = bench.ratios(Fake([1.0, 2.0], 50), Fake([2.0, 4.0], 150))
    assert found["prefill"] == {"median": 2.0, "min": 2.0, "max": 2.0} and found["decode"]["median"] == 2.0
    assert found["prefill_by_flops"] == 3.0 and found["decode_by_bytes"] == 3.0


def test_dense_and_pruned_side_by_side(dense_bundle, fastv_bundle, tmp_path, capsys):
    out = tmp_path / "bench.json"
    argv = [str(dense_bundle), str(fastv_bundle), "--new-tokens", "4", "--repeat", "3", "--prompt-tokens", "90"]
    assert bench_cli.main([*argv, "--json", str(out)]) == 0
    captured = capsys.readouterr()
    assert (
        "round 4 of 4" in captured.err
        and "prefill speed-up" in captured.out
        and "peak" not in captured.out.split("process")[0]
    )
    report = json.loads(out.read_text())
    dense, pruned = report["bundles"]
    assert report["versions"]["onnxruntime"] and report["driver"] is None and report["device"].endswith("cores")
    assert (dense["tokens"], dense["visual"], dense["kept"], pruned["kept"]) == (90, 16, 16, 8)
    assert pruned["digest"] == open_bundle(fastv_bundle).digest
    assert len(pruned["samples"]) == 3 and all(len(s["decode"]) == 3 for s in pruned["samples"])
    for one in pruned["samples"]:
        assert 0 < one["vision"] + one["embed"] + one["prefill"] <= one["ttft"] and one["tpot"] * 3 >= sum(
            one["decode"]
        )
    assert pruned["memory"]["caches_as_predicted"] and dense["memory"]["caches_as_predicted"]
    assert [group["layers"] for group in pruned["memory"]["groups"]] == [[0, 1], [2, 3]]
    ratio = dense["prefill_macs"] / pruned["prefill_macs"]
    assert pruned["against"]["prefill_by_flops"] == ratio > 1 and "against" not in dense
    assert pruned["share_of_bandwidth"] is None and pruned["share_of_flops"] is None
    text = table({**report, "bundles": [{**pruned, "share_of_bandwidth": 0.731}]})
    assert "73.1%" in text


def test_image_features_count_as_what_is_kept(export_tiny, tmp_path, capsys):
    """Cross-attention: features instead of image tokens."""
    folders = [export_tiny(f"bench-{method}", family="mllama", method=method) for method in ("none", "trimmed-llama")]
    out = tmp_path / "bench.json"
    argv = [*map(str, folders), "--new-tokens", "3", "--repeat", "1", "--warmup", "0", "--json", str(out)]
    assert bench_cli.main(argv) == 0
    dense, pruned = json.loads(out.read_text())["bundles"]
    assert dense["visual"] == dense["kept"] == pruned["visual"] == 68 and 17 <= pruned["kept"] < 68
    assert pruned["against"]["prefill"]["median"] > 0 and pruned["against"]["prefill_by_flops"] > 1
    assert f"{pruned['kept']} of 68" in capsys.readouterr().out


def test_shares_of_a_peak_that_the_user_names(fastv_bundle, tmp_path, capsys):
    out = tmp_path / "bench.json"
    argv = [str(fastv_bundle), "--new-tokens", "2", "--repeat", "1", "--warmup", "0", "--json", str(out)]
    assert bench_cli.main([*argv, "--peak-bandwidth", "10", "--peak-flops", "2"]) == 0
    (found,) = json.loads(out.read_text())["bundles"]
    bandwidth, prefill = found["metrics"]["bandwidth"]["median"], found["metrics"]["prefill"]["median"]
    assert found["share_of_bandwidth"] == pytest.approx(bandwidth / 10e9)
    assert found["share_of_flops"] == pytest.approx(2 * found["prefill_macs"] / prefill / 2e12)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--new-tokens", "1"], "--new-tokens 2 or more"),
        (["--repeat", "0"], "--repeat 1 or more"),
        (["--prompt-tokens", "5"], "the prompt has"),
        (["--prompt-tokens", "510"], "larger --max-seq-len"),
        (["--images", "-1"], "--images is -1"),
        (["--image", "nowhere.png"], "no picture at nowhere.png"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(fastv_bundle, argv, says, capsys):
    assert bench_cli.main([str(fastv_bundle), "--backend", "ort-cpu", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("bench-vlm: ") and says in error and "\n" not in error


def test_a_folder_that_is_no_bundle(tmp_path, capsys):
    assert bench_cli.main([str(tmp_path)]) == 2
    assert "is no bundle" in capsys.readouterr().err


def test_peaks_are_known_by_name_and_never_of_a_slice():
    whole = machine.parse_gpu("NVIDIA H100 80GB HBM3, 580.159.04, 512, Disabled\n")
    assert whole == machine.Gpu("NVIDIA H100 80GB HBM3", "580.159.04", 512 << 20, False)
    assert whole.peak.bandwidth == 3.35e12
    assert bench.known_peak(None, whole, "float16") == whole.peak
    assert bench.known_peak(None, whole, "float32") == Peak(3.35e12, None)
    assert bench.known_peak(Peak(1e12, 2e12), whole, "float32") == Peak(1e12, 2e12)
    assert bench.known_peak(None, None, "float16") == Peak(None, None)
    assert machine.parse_gpu("NVIDIA H100 80GB HBM3, 580, 512, Enabled").peak == Peak(None, None)
    assert machine.parse_gpu("Some GPU, 1, 2, [N/A]").peak == Peak(None, None)
    assert machine.parse_gpu("No devices were found") is None


def test_multiply_adds_of_layers_that_choose_are_the_graphs(export_tiny, tmp_path):
    """Every product with a weight and every Attention of a prefill, by the shapes that ONNX Runtime ran them on;
    budgets differ from layer to layer, and what scores the tokens (the probe rows) is not counted."""
    folder = tmp_path / "bundle"
    shutil.copytree(export_tiny("zipvl", method="zipvl", max_batch=2, budgets=(0.5, 0.3, 0.7, 0.4)), folder)
    bundle, seen = open_bundle(folder), {}

    def keep(graph, feeds, run):
        seen[graph] = dict(feeds)
        return run(feeds)

    ids = [256, 5, *[259] * 16, *range(40, 60)]
    session = Session(bundle, watch(make_backend("ort-cpu"), keep))
    session.prefill([ids], session.processor([generated_picture(0)]))
    model = ir.load(folder / "decoder.onnx")
    products = [node for node in model.graph if node.op_type == "MatMul" and weight_of(node) is not None]
    products = [node for node in products if ".probe" not in node.name]
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert len(products) == 4 * 7 and len(attentions) == 4  # the logits are a Gemm
    values = {node.outputs[0] for node in products} | {v for node in attentions for v in node.inputs[:2]}
    asked = sorted(value.name for value in values)
    for value in values - set(model.graph.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    ir.save(model, folder / "counted.onnx")
    graph = onnxruntime.InferenceSession(folder / "counted.onnx", providers=["CPUExecutionProvider"])
    empty = {v.name: np.zeros((1, *v.shape[1:]), np.float32) for v in graph.get_inputs() if v.name.startswith("past")}
    shapes = {name: found.shape for name, found in zip(asked, graph.run(asked, seen["decoder"] | empty), strict=True)}
    total = sum(math.prod(shapes[node.outputs[0].name][:-1]) * math.prod(weight_of(node).shape) for node in products)
    for node in attentions:
        (_, heads, rows, size), keys = (shapes[value.name] for value in node.inputs[:2])
        total += 2 * heads * rows * keys[2] * size
    assert bundle.contract.prefill_macs(len(ids), 16) - bundle.contract.macs.logits == total


def weight_of(node):
    """The initializer that a MatMul multiplies by, or None."""
    right = node.inputs[1]
    if right.producer() is not None and right.producer().op_type == "Transpose":
        right = right.producer().inputs[0]
    return right if right.is_initializer() else None


def test_activations_are_the_backends(dense_bundle):
    """Of every subject, as run-vlm and check-vlm have them; the record says which."""
    levels = []
    for activations in ("int8", "float32"):
        work = bench.Work("What?", (), None, 2, 1, 0, activations=activations)
        levels.append(bench.Subject(dense_bundle, "ort-cpu", work).backend._entries)
        assert levels[-1] == make_backend("ort-cpu", activations=activations)._entries
    assert levels[0] != levels[1]
    assert bench.measure([dense_bundle], "ort-cpu", work)["activations"] == "float32"
    assert bench_cli.parser().parse_args(["b", "--activations", "float32"]).activations == "float32"
