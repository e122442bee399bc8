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
    """made(family, dtype, **variant) -> (folder of a checkpoint, its model)."""
    cache = {}

    def get(family, dtype="float32", **variant):
        key = family, dtype, repr(variant)
        if key not in cache:
            folder, module = tmp_path_factory.mktemp(family), checkpoints.load_family(family)
            checkpoint = tiny.write_checkpoint(module, folder / "checkpoint", **variant)
            full = module.MODEL_CLASS.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
            for part in (full.model.language_model, full.model.vision_tower):
                part.config._attn_implementation = "eager"
            cache[key] = checkpoint, full
        return cache[key]

    return get


def parts_of(maker, full, folder):
    """(vision, embedding): as transformers.js has them, with features flat and put in, or mobius-onnx's."""
    if maker == "mobius":
        return exporters.parts_by_mobius(full, folder, full.config.model_type)
    return exporters.parts_by_torch(full, folder, maker == "merging", maker == "merging", 14 if maker == "js" else 17)


def export(checkpoint, output, dtype, *arguments):
    fits = ["--max-seq-len", "256", "--dtype", dtype, "--k", "2", "--r", "0.5", "--output", str(output)]
    assert cli.main(["--like", str(checkpoint), *fits, *arguments]) == 0
    return output


# Three heads: of 144 columns, whose root mobius-onnx, which rounds it to float16, has whole.
@pytest.mark.parametrize(
    ("family", "maker", "variant"),
    [
        (llava, "js", {}),
        (llava, "merging", {}),
        (gemma3, "mobius", {"heads": 3, "kv_heads": 1}),
    ],
)
def test_two_rows_of_two_pictures_are_what_transformers_makes_of_them(made, tmp_path, family, maker, variant):
    """Each graph alone; mobius-onnx's are for one picture, and one row."""
    name = family.__name__.rpartition(".")[2]
    _, full = made(name, **variant)
    shape = family.read_shape(full.config)
    specs = family.vision_spec(shape, "float32"), family.embed_spec(shape, "float32")
    vision, embedding = parts_of(maker, full, tmp_path)
    vision = own_vision(load(vision), specs[0])
    embedding = own_embedding(load(embedding), specs[1], shape.vocabulary, shape.image_token_id)
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
    vision, embedding = parts_of(maker, full, tmp_path)
    decoder = exporters.by_torch(full.model.language_model, full.lm_head, tmp_path / "decoder.onnx", False, 17)
    given = ["--vision", str(vision), "--embedding", str(embedding), "--decoder", str(decoder)]
    bundle = export(checkpoint, tmp_path / "bundle", "float16", *given, "--engine", "tensorrt-rtx")
    stages = json.loads((bundle / "job.json").read_text())["stages"]
    assert not any(stage.startswith("trace") for stage in stages)
    for name in ("vision", "embed", "decoder"):
        assert f"{name}.safetensors" in (bundle / "SHA256SUMS").read_text()
        assert (bundle / f"{name}.engine").stat().st_size > 100_000
    assert check_cli.main([str(bundle), "--backend", "ort-cpu", "--tokens", "4"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "variant"),
    [("gemma3", "float32", {"heads": 3, "kv_heads": 1}), ("gemma3", "float16", {"heads": 3, "kv_heads": 1})],
)
def test_mobius_beside_a_traced_decoder(made, tmp_path, family, dtype, variant):
    checkpoint, full = made(family, dtype, **variant)
    vision, embedding = parts_of("mobius", full, tmp_path)
    given = ["--vision", str(vision), "--embedding", str(embedding), "--engine", "tensorrt-rtx"]
    bundle = export(checkpoint, tmp_path / "bundle", dtype, *given)
    assert all((bundle / f"{name}.engine").stat().st_size > 100_000 for name in ("vision", "embed"))
    assert check_cli.main([str(bundle), "--backend", "ort-cpu", "--tokens", "4"]) == 0


@pytest.mark.slow
def test_a_tower_that_computes_something_else_is_found_by_check_vlm(made, tmp_path, capsys):
    """mobius-onnx norms the last states of a LLaVA's tower, which transformers takes as they are."""
    checkpoint, full = made("llava", vision="siglip_vision_model")
    vision, embedding = parts_of("mobius", full, tmp_path)
    decoder = exporters.by_mobius(full.model.language_model, full.lm_head, tmp_path / "decoder.onnx", "default")
    given = ["--embedding", str(embedding), "--decoder", str(decoder)]
    status = []
    for name, more in (("whole", ["--vision", str(vision)]), ("traced", [])):
        bundle = export(checkpoint, tmp_path / name, "float32", *given, *more)
        status.append(check_cli.main([str(bundle), "--backend", "ort-cpu", "--tokens", "4"]))
    assert status == [1, 0]
    assert "FAILED" in capsys.readouterr().out


def test_external_data_is_linked_where_asked(made, tmp_path):
    checkpoint, full = made("llava")
    graphs = dict(zip(("vision", "embedding"), parts_of("js", full, tmp_path), strict=True))
    graphs["decoder"] = exporters.by_torch(full.model.language_model, full.lm_head, tmp_path / "d.onnx", False, 17)
    given = []
    for name, path in graphs.items():
        beside = tmp_path / f"{name}-outside.onnx"
        ir.save(ir.load(path), beside, external_data=f"{name}.bin", size_threshold_bytes=64)
        given += [f"--{name}", str(beside)]
    bundle = export(checkpoint, tmp_path / "bundle", "float32", *given, "--link-weights")
    for name, theirs in (("vision", "vision"), ("embed", "embedding"), ("decoder", "decoder")):
        assert (bundle / f"{name}-0.data").samefile(tmp_path / f"{theirs}.bin")


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    checkpoint, full = made("llava")
    vision, embedding = map(str, parts_of("js", full, tmp_path))
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
