"""export-vlm --decoder: a bundle around a decoder that another exporter wrote."""

import os

import exporters
import numpy as np
import onnx_ir as ir
import pytest
import transformers

from vlmtrim import runtime
from vlmtrim.export import check_cli, cli
from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export.weights import tiny
from vlmtrim.graphs import GraphError, load
from vlmtrim.graphs.foreign.own_form import own_form


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny LLaVA's."""
    return tiny.write_checkpoint(checkpoints.load_family("llava"), tmp_path_factory.mktemp("given") / "checkpoint")


def model(checkpoint, dtype="float32"):
    return transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()


@pytest.fixture(scope="module")
def made(checkpoint):
    """Its decoder as mobius-onnx writes it, beside it."""
    pytest.importorskip("mobius", reason="mobius-onnx is not installed (extra peers)")
    folder, full = checkpoint.parent, model(checkpoint)
    exporters.by_mobius(full.model.language_model, full.lm_head, folder / "decoder.onnx", "default")
    return folder, checkpoint


def export(made, name, *arguments, decoder="decoder.onnx", dtype="float32"):
    folder, checkpoint = made
    output = folder / name
    fits = ["--max-seq-len", "256", "--dtype", dtype, "--output", str(output)]
    assert cli.main(["--decoder", str(folder / decoder), "--like", str(checkpoint), *fits, *arguments]) == 0
    return output


@pytest.mark.slow
def test_the_bundle_answers_as_the_traced_one(made, picture):
    """Kept tokens equal, logits within float32's noise, over two turns."""
    given = export(made, "given", "--k", "2", "--r", "0.5")
    folder, checkpoint = made
    traced = folder / "traced"
    fits = ["--max-seq-len", "256", "--dtype", "float32", "--output", str(traced)]
    assert cli.main(["--model", str(checkpoint), *fits, "--k", "2", "--r", "0.5"]) == 0
    found = []
    for bundle in (given, traced):
        with runtime.open(bundle, backend="ort-cpu") as chat:
            steps = list(chat.generate("What is it?", [picture], max_new_tokens=4))
            steps += list(chat.generate("Why?", max_new_tokens=2))
            found.append((steps[0].prefill.kept_indices, steps[0].prefill.logits, [step.token_ids for step in steps]))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-5 * np.abs(found[1][1]).max())
    assert found[0][2] == found[1][2]


def test_it_is_held_against_pytorch_and_its_engines_build(made):
    """By check-vlm: the checkpoint's model is what the decoder was made of; k directly before the last layer."""
    bundle = export(made, "checked", "--k", "3", "--r", "0.5", "--engine", "tensorrt-rtx")
    assert "decoder.safetensors" in (bundle / "SHA256SUMS").read_text()
    assert (bundle / "decoder.engine").stat().st_size > 100_000
    assert check_cli.main([str(bundle), "--backend", "ort-cpu"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_written_out_is_held_against_pytorch_and_its_engines_build(checkpoint, dtype):
    """As ``torch.onnx.export`` and optimum trace it: products, mask, softmax, and caches joined by Concat. With vision
    and embedding of others, test_given_parts.py has the same."""
    folder, full = checkpoint.parent, model(checkpoint, dtype)
    full.model.language_model.config._attn_implementation = "eager"
    decoder = folder / f"traced-{dtype}.onnx"
    exporters.by_torch(full.model.language_model, full.lm_head, decoder, False, 17)
    more = ["--k", "2", "--r", "0.5", "--engine", "tensorrt-rtx"]
    bundle = export((folder, checkpoint), f"traced-{dtype}", *more, decoder=decoder.name, dtype=dtype)
    assert (bundle / "decoder.engine").stat().st_size > 100_000
    assert check_cli.main([str(bundle), "--backend", "ort-cpu"]) == 0


@pytest.mark.parametrize(
    ("provider", "dtype"), [("cpu", "float32"), pytest.param("dml", "float16", marks=pytest.mark.slow)]
)
def test_decoders_of_genai_are_held_against_pytorch(checkpoint, provider, dtype):
    """GroupQueryAttention with the rotary embedding inside (cpu) and outside (dml); engines of the latter."""
    full = model(checkpoint, dtype)
    text = transformers.LlamaForCausalLM(full.config.text_config).eval()
    text.model, text.lm_head = full.model.language_model, full.lm_head
    folder = checkpoint.parent / f"genai-{provider}"
    folder.mkdir()
    path = exporters.by_genai(text, folder, provider, {"float32": "fp32", "float16": "fp16"}[dtype])
    inside = {n.attributes["do_rotary"].as_int() for n in ir.load(path).graph if n.op_type == "GroupQueryAttention"}
    assert inside == {int(provider == "cpu")}
    more = ["--k", "2", "--r", "0.5", "--engine", "none" if provider == "cpu" else "tensorrt-rtx"]
    name = str(path.relative_to(checkpoint.parent))
    bundle = export((checkpoint.parent, checkpoint), f"of-{provider}", *more, decoder=name, dtype=dtype)
    assert check_cli.main([str(bundle), "--backend", "ort-cpu"]) == 0


def test_decoders_of_four_bits_are_refused_by_name(tmp_path):
    """trim-onnx takes them: it looks at no weight."""
    *_, whole = exporters.text_model("Llama")
    decoder = load(exporters.by_genai(whole, tmp_path, precision="int4"))
    with pytest.raises(GraphError, match=r"weights in float; found com\.microsoft\.MatMulNBits .*--weights int4"):
        own_form(decoder, 64)


def outside(made):
    """The decoder again, its weights in a file beside it."""
    folder, _ = made
    if not (folder / "outside.onnx").is_file():
        ir.save(
            ir.load(folder / "decoder.onnx"), folder / "outside.onnx", external_data="w.bin", size_threshold_bytes=64
        )
    return folder / "w.bin"


def test_weights_beside_the_decoder_are_linked_where_asked(made):
    """The file as it is, under one name more; without --link-weights what is read of it is written anew, or cloned."""
    weights = outside(made)
    linked = export(made, "linked", "--link-weights", decoder="outside.onnx")
    assert (linked / "decoder-0.data").samefile(weights)
    assert "decoder-0.data" in (linked / "SHA256SUMS").read_text() and not (linked / "decoder.safetensors").exists()
    answers = []
    for bundle in (linked, export(made, "copied", decoder="outside.onnx")):
        with runtime.open(bundle, backend="ort-cpu") as chat:
            answers.append([step.token_ids for step in chat.generate("What is it?", max_new_tokens=4)])
    assert answers[0] == answers[1]


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    folder, checkpoint = made
    decoder, output = str(folder / "decoder.onnx"), str(tmp_path / "bundle")
    model = ir.load(decoder)
    model.graph.outputs[0].name = "scores"
    ir.save(model, tmp_path / "renamed.onnx")
    cut = ir.load(decoder)
    ir.save(cut, tmp_path / "cut.onnx", external_data="cut.bin", size_threshold_bytes=4096)
    os.truncate(tmp_path / "cut.bin", 4096)
    like = ["--like", str(checkpoint), "--output", output, "--max-seq-len", "256"]
    for arguments, status, expected in [
        (["--decoder", str(tmp_path / "none.onnx"), *like], 2, "is no file"),
        (["--decoder", decoder, *like, "--weights", "int8"], 2, "leave them out"),
        (["--decoder", decoder, *like, "--dtype", "float16"], 2, "give --dtype float32"),
        (["--decoder", str(tmp_path / "renamed.onnx"), *like, "--dtype", "float32"], 1, "expected the output logits"),
        (["--decoder", str(tmp_path / "cut.onnx"), *like, "--dtype", "float32"], 1, "the file is cut off"),
        (["--decoder", str(checkpoint / "config.json"), *like, "--dtype", "float32"], 2, "not a readable ONNX file"),
    ]:
        assert cli.main(arguments) == status
        said = capsys.readouterr().err.strip().splitlines()
        assert expected in said[-1], said
        assert not (tmp_path / "bundle").exists()
