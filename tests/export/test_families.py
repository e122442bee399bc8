"""What every family stands with every method that it names, by being there; README's table comes from here."""

import json

import pytest
from parity import ENGINES, FIELDS, assert_parity, combinations, room_of

from vlmtrim.export import check_cli
from vlmtrim.runtime.engines import fingerprint


@pytest.mark.parametrize(("family", "method"), combinations("ONNX Runtime CPU"))
def test_prefill_decode_and_second_turn_equal_pytorch(family, method, export_tiny, capsys, proves):
    """Float32 against the unpatched model and the family's oracle, within 1e-4."""
    folder = export_tiny("chat", family=family, method=method, **room_of(family), **FIELDS.get(method, {}))
    assert_parity(folder, capsys)
    proves(family, method, "ONNX Runtime CPU")


# Rounding to float16 changes which tokens hold tau in some layer of the random model: float32 parity is proven above.
FLIPS = {("llava_next", "zipvl"), ("qwen2_vl", "zipvl")}

# A tie in an early stage, which float16 decides otherwise: what follows is of other tokens.
TIES = {("qwen2_vl", "pyramid")}


@pytest.mark.parametrize(("family", "method"), combinations(ENGINES))
def test_float16_is_within_its_tolerance_and_its_engines_build(family, method, export_tiny, capsys, proves):
    """TensorRT-RTX builds all three graphs; the decode profile brings one or two tokens and nothing visual."""
    folder = export_tiny(
        "half",
        family=family,
        method=method,
        dtype="float16",
        engine="tensorrt-rtx",
        max_batch=2,
        images=2,
        **FIELDS.get(method, {}),
    )
    prints = json.loads((folder / fingerprint.FILE).read_text())
    assert set(prints) == {"vision.engine", "embed.engine", "decoder.engine"}
    assert all((folder / name).stat().st_size == entry["bytes"] > 100_000 for name, entry in prints.items())
    both = prints["decoder.engine"]["profiles"]
    assert set(both) == {"prefill", "decode"} and both["decode"]["S"] == [1, 1, 2]
    assert both["decode"].get("N", [0, 0, 0]) == [0, 0, 0]
    if (family, method) in TIES:
        assert check_cli.main([str(folder), "--tokens", "4"]) == 0  # the margins say so
    elif (family, method) not in FLIPS:
        assert_parity(folder, capsys, "--tokens", "4")
    proves(family, method, ENGINES)
