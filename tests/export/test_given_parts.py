"""export-vlm --vision --embedding: graphs that other exporters wrote, beside their decoder or a traced one."""

import json
import re

import exporters
import numpy as np
import onnx_ir as ir
import pytest
import torch
from plain_loop import session

from vlmtrim.export import check_cli, cli
from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export.families import gemma3, llava
from vlmtrim.export.weights import tiny
from vlmtrim.graphs import load
from vlmtrim.graphs.foreign.embedding import own_embedding
from vlmtrim.graphs.foreign.vision import own_vision
from vlmtrim.graphs.lint import lint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family, dtype, text={settings of the text model}, **variant) -> (folder of a checkpoint, its model)."""
    cache = {}

    def get(family, dtype="float32", text=(), **variant):
        key = family, dtype, repr((text, variant))
        if key not in cache:
            folder, module = tmp_path_factory.mktemp(family), checkpoints.load_family(family)
            checkpoint = tiny.write_checkpoint(module, folder / "checkpoint", **variant)
            raw = json.loads((checkpoint / "config.json").read_text())
            raw["text_config"] |= dict(text)
            (checkpoint / "config.json").write_text(json.dumps(raw))
            full = module.MODEL_CLASS.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
            for part in (full.model.language_model, full.model.vision_tower):
                part.config._attn_implementation = "eager"
            cache[key] = checkpoint, full
        return cache[key]

    return get


def parts_of(maker, full, folder):
    """Files by option: as transformers.js has them, with features flat and put in, or all three of mobius-onnx."""
    if maker == "mobius":
        return exporters.parts_by_mobius(full, folder, full.config.model_type)
    return exporters.parts_by_torch(full, folder, maker == "merging", maker == "merging", 14 if maker == "js" else 17)


def export(checkpoint, output, dtype, files, *arguments):
    fits = ["--max-seq-len", "256", "--dtype", dtype, "--k", "2", "--r", "0.5", "--output", str(output)]
    given = [argument for name, path in files.items() for argument in (f"--{name}", str(path))]
    assert cli.main(["--like", str(checkpoint), *fits, *given, *arguments]) == 0
    return output


def check(bundle):
    return check_cli.main([str(bundle), "--backend", "ort-cpu", "--tokens", "4"])


def with_decoder(full, files, folder):
    """The same with the decoder as ``torch.onnx.export`` traces it."""
    path = exporters.by_torch(full.model.language_model, full.lm_head, folder / "traced.onnx", False, 17)
    return {**files, "decoder": path}


# Three heads: of 144 columns, whose root mobius-onnx, which rounds it to float16, has whole. Its scores are over the
# root of a head's size, whatever the checkpoint says.
GEMMA = {"heads": 3, "kv_heads": 1, "text": {"query_pre_attn_scalar": 64}}


@pytest.mark.parametrize(
    ("family", "maker", "variant"),
    [
        (llava, "js", {}),
        (llava, "merging", {}),
        (gemma3, "mobius", GEMMA),
    ],
)
def test_two_rows_of_two_pictures_are_what_transformers_makes_of_them(made, tmp_path, family, maker, variant):
    """Each graph alone; mobius-onnx's are for one picture, and one row."""
    name = family.__name__.rpartition(".")[2]
    _, full = made(name, **variant)
    shape = family.read_shape(full.config)
    specs = family.vision_spec(shape, "float32"), family.embed_spec(shape, "float32")
    files = parts_of(maker, full, tmp_path)
    vision = own_vision(load(files["vision"]), specs[0])
    embedding = own_embedding(load(files["embedding"]), specs[1], shape.vocabulary, shape.image_token_id)
    for graph, spec in zip((vision, embedding), specs, strict=True):
        lint(graph, spec)
    size, per = shape.image_size, shape.image_tokens
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    (features,) = session(vision).run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        want = torch.stack(list(full.get_image_features(pixels).pooler_output)).numpy()
    np.testing.assert_allclose(features, want, rtol=0, atol=1e-5 * np.abs(want).max())
    starts = [(1, 1 + per), (2, 7 + per)]  # side by side, and apart
    ids = np.random.default_rng(3).integers(4, 200, (2, 2 * per + 9))
    places = np.array([[start + i for start in row for i in range(per)] for row in starts])
    np.put_along_axis(ids, places, shape.image_token_id, 1)
    by_row = features.reshape(2, 2 * per, -1)
    given = {"input_ids": ids, "image_features": by_row, "visual_positions": places}
    (found,) = session(embedding).run(None, given)
    with torch.no_grad():
        want = full.get_input_embeddings()(torch.from_numpy(ids)).numpy()
    np.put_along_axis(want, places[:, :, None], by_row, 1)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("maker", ["merging", pytest.param("js", marks=pytest.mark.slow)])
def test_a_bundle_of_three_graphs_is_held_against_pytorch_and_its_engines_build(made, tmp_path, maker):
    """Nothing is traced then."""
    checkpoint, full = made("llava", "float16")
    files = with_decoder(full, parts_of(maker, full, tmp_path), tmp_path)
    bundle = export(checkpoint, tmp_path / "bundle", "float16", files, "--engine", "tensorrt-rtx")
    stages = json.loads((bundle / "job.json").read_text())["stages"]
    assert not any(stage.startswith("trace") for stage in stages)
    for name in ("vision", "embed", "decoder"):
        assert f"{name}.safetensors" in (bundle / "SHA256SUMS").read_text()
        assert (bundle / f"{name}.engine").stat().st_size > 100_000
    assert check(bundle) == 0


def test_windows_and_pictures_that_see_ahead(made, tmp_path):
    """Gemma 3 of mobius-onnx: its decoder is causal in pictures, and gets the contract's mask; prompts outgrow the
    window, whose layers have caches of their own."""
    checkpoint, full = made("gemma3", **GEMMA)
    files = parts_of("mobius", full, tmp_path)
    bundle = export(checkpoint, tmp_path / "bundle", "float32", files, "--max-input-len", "64")
    assert len(json.loads((bundle / "contract.json").read_text())["groups"]) == 4
    assert check(bundle) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("decoder", ["mobius", "torch", "traced anew"])
def test_engines_of_windows(made, tmp_path, decoder, dtype):
    checkpoint, full = made("gemma3", dtype, **GEMMA)
    files = parts_of("mobius", full, tmp_path)
    if decoder == "torch":
        files = with_decoder(full, files, tmp_path)
    elif decoder != "mobius":
        del files["decoder"]
    bundle = export(checkpoint, tmp_path / "bundle", dtype, files, "--engine", "tensorrt-rtx")
    assert all((bundle / f"{name}.engine").stat().st_size > 100_000 for name in ("vision", "embed", "decoder"))
    assert check(bundle) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant", "wrong"),
    [("llava", {"vision": "siglip_vision_model"}, "vision"), ("gemma3", {**GEMMA, "text": {}}, "decoder")],
)
def test_graphs_that_compute_something_else_are_found_by_check_vlm(made, tmp_path, family, variant, wrong):
    """mobius-onnx norms the last states of a LLaVA's tower, which transformers takes as they are, and knows no
    query_pre_attn_scalar of Gemma 3."""
    checkpoint, full = made(family, **variant)
    files = parts_of("mobius", full, tmp_path)
    assert check(export(checkpoint, tmp_path / "whole", "float32", files)) == 1
    del files[wrong]
    assert check(export(checkpoint, tmp_path / "without", "float32", files)) == 0


def test_external_data_is_linked_where_asked(made, tmp_path):
    checkpoint, full = made("llava")
    beside = {}
    for name, path in with_decoder(full, parts_of("js", full, tmp_path), tmp_path).items():
        beside[name] = tmp_path / f"{name}-outside.onnx"
        ir.save(ir.load(path), beside[name], external_data=f"{name}.bin", size_threshold_bytes=64)
    bundle = export(checkpoint, tmp_path / "bundle", "float32", beside, "--link-weights")
    for name, theirs in (("vision", "vision"), ("embed", "embedding"), ("decoder", "decoder")):
        assert (bundle / f"{name}-0.data").samefile(tmp_path / f"{theirs}.bin")


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    checkpoint, full = made("llava")
    vision, embedding = map(str, parts_of("js", full, tmp_path).values())
    tiled = tiny.write_checkpoint(checkpoints.load_family("llava_next"), tmp_path / "tiled")
    wide = tiny.write_checkpoint(checkpoints.load_family("llava"), tmp_path / "wide", heads=8)
    fits = ["--dtype", "float32", "--output", str(tmp_path / "bundle"), "--max-seq-len", "256"]
    like = ["--like", str(checkpoint), *fits]
    for arguments, status, expected in [
        (["--vision", str(tmp_path / "none.onnx"), *like], 2, "--vision .*none.onnx is no file"),
        (["--vision", str(checkpoint / "config.json"), *like], 2, "not a readable ONNX file"),
        (["--vision", vision, *like, "--vision-weights", "int8"], 2, "--vision its file says"),
        (["--vision", vision, *like, "--method", "visionzip"], 2, "leave --vision out"),
        (["--vision", vision, *like, "--score", "fastervlm"], 2, "leave --vision out"),
        (["--vision", vision, "--like", str(tiled), *fits], 1, "takes pixel_values, feature_index.*--vision out"),
        (["--vision", vision, "--like", str(wide), *fits], 1, "16 features of width 512.*found .*256"),
        (["--embedding", embedding, "--like", str(wide), *fits], 1, "tokens of width 512.*found .272,256"),
        (["--vision", embedding, *like], 1, "expected the input pixel_values .I, 3, H, W.; found input_ids"),
        (["--embedding", vision, *like], 1, "inputs input_ids and, at most, image_features; found pixel_values"),
    ]:
        assert cli.main(arguments) == status, arguments
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(expected, said), said
        assert not (tmp_path / "bundle").exists()
