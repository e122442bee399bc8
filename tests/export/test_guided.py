"""--emit-guide against transformers' own attentions (eager, output_attentions): sums over layers, heads and rows."""

import json

import numpy as np
import pytest
import torch
from parity import assert_parity

from vlmtrim.export import cli
from vlmtrim.export.checkpoint import load_family, load_reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.engines import fingerprint
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

TOKENS = [40, 41, 42]  # said after the prompt


def emitting(export_tiny, **fields):
    return export_tiny("emitting", method="none", emit_guide=True, **{"max_batch": 2, **fields})


@torch.no_grad()
def sums(folder, family, ids, images):
    """What each visual token of a prompt received from the rows behind the last one and from TOKENS, float64 [N]."""
    reference = load_reference(family)(load_family(family).MODEL_CLASS, folder, None)
    visual = [index for index, token in enumerate(ids) if token == reference._visual_token]
    pictures, total = reference._inputs(Turn("t", ids, images)), np.zeros(len(visual))
    for step, (tokens, brought) in enumerate([(ids, pictures), *(([token], {}) for token in TOKENS)]):
        tensor = torch.tensor([tokens])
        positions = reference._positions(tensor, brought)
        reference._position = int(positions.max()) + 1
        output = reference.model(
            input_ids=tensor,
            **brought,
            **reference._told(tensor, brought),
            position_ids=positions,
            past_key_values=reference._cache,
            use_cache=True,
            output_attentions=True,
        )
        first = visual[-1] + 1 if step == 0 else 0
        for layer in output.attentions:
            total += layer[0, :, first:, visual].double().sum(dim=(0, 1)).numpy()
    return total


def prompts(session, lengths):
    """A prompt a row: words, a picture, words, as many as ``lengths`` says; and the pictures."""
    images = tuple(generated_picture(seed) for seed in range(len(lengths)))
    brought = session.processor(images).tokens
    mark, words = (
        session.contract.image_token_id,
        np.random.default_rng(0).integers(0, 250, (len(lengths), 60)).tolist(),
    )
    rows = [
        [256, *line[:before], *[mark] * count, *line[before : before + after]]
        for line, (before, after), count in zip(words, lengths, brought, strict=True)
    ]
    return rows, images


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_what_is_summed_is_transformers_attention(family, export_tiny):
    """Two rows of different length, each as if alone; prompt and three generated tokens."""
    folder = emitting(export_tiny, family=family)
    session = Session(open_bundle(folder), make_backend("ort-cpu"), batch=2)
    rows, images = prompts(session, [(3, 9), (7, 4)])
    session.attention.on = True
    session.prefill(rows, session.processor(images))
    for token in TOKENS:
        session.decode(np.array([token, token]))
    expected = [sums(folder, family, row, images[i : i + 1]) for i, row in enumerate(rows)]
    np.testing.assert_allclose(session.attention.received, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected, axis=1).min() > 0.1  # of about 4 heads x 4 layers x 10 rows


def test_a_row_that_has_ended_adds_nothing_and_more_rows_than_the_bundle_sums_are_the_last(export_tiny):
    folder = emitting(export_tiny)
    session = Session(open_bundle(folder), make_backend("ort-cpu"), batch=2)
    rows, images = prompts(session, [(3, 9), (7, 4)])
    session.attention.on = True
    session.prefill(rows, session.processor(images))
    before = session.attention.received
    session.decode(np.array([40, 41]), np.array([True, False]))
    after = session.attention.received
    assert (after[0] > before[0]).all() and (after[1] == before[1]).all()
    assert session.contract.dims["R"] == (0, 256)
    session.reset()
    session.attention._most = 2  # as if the bundle summed two rows at most
    session.prefill(rows, session.processor(images))
    few = session.attention.received
    assert (few < before).all() and (few.sum(axis=1) > 0).all()
    heads = session.contract.groups[0].kv_heads * 2
    assert (few.sum(axis=1) <= 2 * heads * len(session.contract.groups[0].layers)).all()


def test_an_emitting_bundle_is_the_unpruned_one_and_its_engines_build(export_tiny, dense_bundle, capsys):
    """Parity with PyTorch; without rows to sum every logit is that of the plain bundle, to the bit."""
    folder = emitting(export_tiny, dtype="float16", engine="tensorrt-rtx")
    profiles = json.loads((folder / fingerprint.FILE).read_text())["decoder.engine"]["profiles"]
    assert profiles["prefill"]["R"] == [0, 64, 256] and profiles["decode"]["R"] == [0, 1, 1]
    assert_parity(folder, capsys, "--tokens", "4")
    found = []
    for bundle in (emitting(export_tiny), dense_bundle):
        session = Session(open_bundle(bundle), make_backend("ort-cpu"))
        rows, images = prompts(session, [(3, 9)])
        found.append([session.prefill(rows, session.processor(images)).logits, session.decode(np.array([40]))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "demo"], "--emit-guide returns attention to all visual tokens, and method fastv removes some"),
        (["--model", "tiny:mllama", "--method", "none"], "features of cross-attention"),
    ],
)
def test_what_cannot_emit_is_refused(argv, says, capsys):
    assert cli.main([*argv, "--emit-guide", "--dry-run"]) == 2
    assert says in capsys.readouterr().err
