"""Rules that read embeddings alone against their second writing; the golden text of all rules; refusals."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from golden_text import assert_golden
from toy_decoder import build, weights

from vlmtrim.export.oracles import rules as oracles
from vlmtrim.graphs import FastV, GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import ATTENTION, GRID, PLACES, Step, cells, load_rule, rule_names, topv_recover
from vlmtrim.graphs.surgery import select

GOLDEN = Path(__file__).parent / "golden"
ALONE = ["divprune", "dpp", "cdpruner", "dart"]
MOST, WIDTH = 64, 24


def alone(rule, r):
    """inputs_embeds, visual_positions, last_index -> kept_indices, scores."""
    embeds = ir.val("inputs_embeds", dtype=ir.DataType.FLOAT, shape=("B", "S", WIDTH))
    visual = ir.val("visual_positions", dtype=ir.DataType.INT64, shape=("B", "N"))
    last = ir.val("last_index", dtype=ir.DataType.INT64, shape=("B",))
    ops = Ops("select")
    sizes = select.counts(ops, embeds, visual, r, MOST)
    step = Step(ops, None, [], embeds, embeds, last, visual, None, sizes, seed=0)
    scores = load_rule(rule).score(step)
    survivors = select.compact(ops, select.keep_best(ops, scores, visual, sizes, r), last, sizes)
    outputs = [survivors.kept_indices, scores]
    for value, dtype in zip(outputs, (ir.DataType.INT64, ir.DataType.FLOAT), strict=True):
        value.type = ir.TensorType(dtype)
    graph = ir.Graph([embeds, visual, last], outputs, nodes=ops.nodes, opset_imports={"": 24}, name="rule")
    return ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def states(random, tokens, twins):
    """Random states with a common part, as features have; ``twins`` of them are equal, as the ends of lines are."""
    made = random.normal(size=(tokens, WIDTH)) + random.normal(size=WIDTH)
    made[random.permutation(tokens)[:twins]] = made[0]
    return made.astype(np.float32)


@pytest.mark.parametrize("rule", ALONE)
@pytest.mark.parametrize("r", [0.25, 0.5, 0.75, 0.9])
def test_picks_equal_the_second_writing(rule, r):
    """Two rows of different length, visual tokens at any places, none to 40 of them, twins among them."""
    session, oracle, random = alone(rule, r), oracles.load_rule(rule), np.random.default_rng(0)
    for count in (0, 1, 3, 9, 16, 40):
        lengths = [count + 5, count + 2]
        visual = np.array([sorted(random.permutation(n - 1)[:count]) for n in lengths], np.int64).reshape(2, count)
        embeds = np.stack([states(random, max(lengths), twins=count // 5) for _ in lengths])
        feeds = {"inputs_embeds": embeds, "visual_positions": visual, "last_index": np.array(lengths) - 1}
        kept, scores = session.run(None, feeds)
        kept_count = round(count * (1 - r))
        assert scores.shape == (2, count)
        for row, length in enumerate(lengths):
            seen = oracles.Seen(WIDTH, embeds=torch.from_numpy(embeds[row, :length]), removed=r)
            seen.seam = seen.embeds
            first, others = oracle.rank(seen, torch.from_numpy(visual[row]), kept_count, 0)
            rest = [i for i in others.sort(descending=True, stable=True).indices.tolist() if i not in first]
            chosen = [*first, *rest][:kept_count]
            expected = [t for t in range(length) if t not in set(visual[row]) - set(visual[row][chosen])]
            assert kept[row][kept[row] < length].tolist() == expected, (count, row)


def test_divprune_keeps_the_farthest():
    """By hand: four directions, each three times; half of twelve keeps every direction once before any twice."""
    embeds = np.zeros((1, 13, WIDTH), np.float32)
    embeds[0, np.arange(12), np.arange(12) // 3] = 1.0 + np.arange(12)
    feeds = {"inputs_embeds": embeds, "visual_positions": np.arange(12)[None], "last_index": np.array([12])}
    kept, scores = alone("divprune", 0.75).run(None, feeds)
    directions = kept[0, :-1] // 3
    assert sorted(directions[:3]) == sorted(set(directions)) and len(directions) == 3
    assert sorted(scores[0])[-3:] == [1, 2, 3]


def test_cells_take_turns():
    """4 x 4 tokens, of which 4 stay: one of every 2 x 2 cell; inside a cell the others are 1, 2 and 3 behind it."""
    assert [cells.side(r) for r in (0, 0.5, 0.75, 0.888, 0.9, 0.9375)] == [2, 2, 2, 2, 3, 4]
    w = weights(3, 2, 2, 1)
    model = FastV(k=1, r=0.75, score="cells")(build(w, 64), visual_tokens=16, grid=(4, 4))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {}
    for value in session.get_inputs():
        shape = [{"B": 1, "S": 18, "N": 16, "W0": 18, "W1": 6}.get(dim, dim) for dim in value.shape]
        feeds[value.name] = np.zeros(shape, np.int64 if "int64" in value.type else np.float32)
    feeds["inputs_embeds"] = np.random.default_rng(0).normal(size=(1, 18, 16)).astype(np.float32)
    feeds["visual_positions"] = np.arange(1, 17)[None]
    feeds["last_index"] = np.array([17])
    feeds["position_ids"], feeds["key_positions.0"], feeds["key_positions.1"] = (
        np.arange(18)[None],
        np.arange(18),
        np.arange(6),
    )
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, feeds), strict=True))
    kept, scores = outputs["kept_indices"][0, 1:-1] - 1, outputs["visual_scores"][0]
    assert sorted(token // 8 * 2 + token % 4 // 2 for token in kept) == [0, 1, 2, 3]  # one of each cell
    for cell in range(4):
        inside = [t for t in range(16) if t // 8 * 2 + t % 4 // 2 == cell]
        assert sorted(np.ceil(-scores[inside])) == [0, 1, 2, 3]


def test_recovery_fits_into_what_stays():
    for visual in range(200):
        for r in (0.25, 0.5, 0.75, 0.9):
            kept = round(visual * (1 - r))
            best = topv_recover.by_rank(visual, kept)
            assert best + -(-(visual - best) // 4) <= kept or best == 0


@pytest.mark.parametrize("rule", [rule for rule in rule_names() if "topv" not in rule])  # that needs norms
def test_the_selection_is_the_golden_text(rule):
    """Of a toy decoder at k = 1 and r = 0.75."""
    model = FastV(k=1, r=0.75, score=rule)(build(weights(0, 2, 4, 2), 16), visual_tokens=4, grid=(2, 2))
    assert_golden(model.graph, GOLDEN / f"rule-{rule}.txt", "select/")


def test_what_a_rule_needs_is_asked_for():
    with pytest.raises(ValueError, match=r"score cells needs a layer's attention, k is 0: .* divprune, dpp"):
        FastV(k=0, score="cells")
    for rule in rule_names():
        needs = load_rule(rule).NEEDS
        if ATTENTION not in needs:
            assert FastV(k=0, score=rule).rule == rule
        if needs & {GRID, PLACES}:
            with pytest.raises(
                GraphError, match=f"score {rule.removesuffix('-recover')} needs to know where tokens lie"
            ):
                FastV(k=1, score=rule)(build(weights(0, 2, 4, 2), 16))


def test_topv_refuses_a_decoder_without_norms():
    with pytest.raises(GraphError, match="no RMSNormalization follows the attention of layer 0"):
        FastV(k=1, score="topv")(build(weights(0, 2, 4, 2), 16), grid=(2, 2))
