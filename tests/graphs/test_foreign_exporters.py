"""FastV in decoders that torch.onnx.export, mobius-onnx and onnxruntime-genai make, against unpatched transformers."""

import exporters
import numpy as np
import pytest
import torch
from oracles import layers as oracle
from oracles.selection import kept_by_score, kept_by_stride
from plain_loop import Loop, session

from vlmtrim.graphs import FastV, load
from vlmtrim.graphs.foreign.cli import main

VISUAL = [[1, 2, 3, 4, 8, 9, 10], [2, 3, 5, 6, 7, 8, 9]]  # two pictures, then one and a half
LENGTHS = (14, 11)
# How a decoder is made, the family of its model, and whether its rows are padded on the left.
MAKERS = {
    "traced": ("Qwen2", True),
    "exported": ("Llama", True),
    "exported-23": ("Llama", True),
    "traced-mrope": ("qwen2_vl", True),
    "traced-phi3": ("Phi3", True),
    "traced-gemma2": ("Gemma2", True),
    "traced-gemma3": ("Gemma3", True),
    "genai-gemma2": ("Gemma2", False),
    "mobius": ("Llama", True),
    "mobius-standard": ("Llama", True),
    "mobius-mrope": ("qwen2_vl", True),
    "mobius-cpu": ("Llama", False),
    "genai": ("Llama", False),
    "genai-int4": ("Llama", False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = {}

    def get(maker):
        if maker not in cache:
            folder = tmp_path_factory.mktemp(maker)
            text, head, whole = exporters.text_model(MAKERS[maker][0], "sdpa" if maker == "exported-23" else "eager")
            path = folder / "model.onnx"
            if maker.startswith("traced"):
                path = exporters.by_torch(text, head, path, False, 17, 3 * (maker == "traced-mrope"))
            elif maker.startswith("exported"):
                path = exporters.by_torch(text, head, path, True, 23 if maker == "exported-23" else 18)
            elif maker.startswith("genai"):
                path = exporters.by_genai(whole, folder, precision="int4" if maker == "genai-int4" else "fp32")
                if maker == "genai-int4":
                    exporters.unpack(path, text, head)
            else:
                provider = {"mobius-standard": "onnx-standard", "mobius-cpu": "cpu"}.get(maker, "default")
                family = "qwen-vl" if maker == "mobius-mrope" else "llava"
                path = exporters.by_mobius(text, head, path, provider, family)
            for layer in text.layers:  # the oracle reads probabilities
                layer.self_attn.config._attn_implementation = "eager"
            cache[maker] = path, text, head, session(path)
        return cache[maker]

    return get


def trimmed(path, k, r=0.5):
    """A session of what trim-onnx writes."""
    target = path.with_name(f"trimmed-{k}-{r}.onnx")
    assert main([str(path), str(target), "--k", str(k), "--r", str(r), "--force"]) == 0
    return session(target)


def expected(text, head, rows, k, axes, r=0.5):
    """(logits, kept) of rows as the oracle has them; it sees the whole conversation, and chooses in its first step."""

    def of(row, x, visual):
        def choose(scores):
            prompt = len(x) - rows.steps
            if row not in rows.kept and scores is None:
                rows.kept[row] = kept_by_stride(prompt, visual, r, 0)
            elif row not in rows.kept:
                rows.kept[row] = kept_by_score(prompt, visual, [scores[j] for j in visual], r)
            return rows.kept[row] + list(range(prompt, len(x)))

        at = torch.arange(len(x)).expand(3, len(x)) if axes else torch.arange(len(x))
        return oracle.forward(text, head, torch.from_numpy(x), at, k, choose)

    return of


class Rows:
    """A conversation: the prompt's rows and what came after."""

    def __init__(self, rows):
        self.whole, self.steps, self.kept = list(rows), 0, {}

    def step(self, rows):
        """One token more a row."""
        self.whole = [np.concatenate([a, b]) for a, b in zip(self.whole, rows, strict=True)]
        self.steps += 1


QUICK = [maker for maker in MAKERS if maker != "exported"]  # torch.export takes its time
CASES = [(maker, 2) for maker in QUICK] + [(maker, k) for maker in ("traced", "mobius", "genai") for k in (0, 1, 3)]
SLOW = [pytest.param(m, k, marks=pytest.mark.slow) for m in MAKERS for k in range(4) if (m, k) not in CASES]


@pytest.mark.parametrize(("maker", "k"), [*CASES, *SLOW])
def test_kept_sets_and_logits_equal_unpatched_transformers(made, maker, k):
    """A batch of two with padding, and 32 steps by a loop that knows nothing of removals."""
    path, text, head, _ = made(maker)
    left, axes = MAKERS[maker][1], 3 * maker.endswith("mrope")
    lengths = LENGTHS if left else (12, 12)  # GroupQueryAttention decodes rows of one length only
    loop = Loop(trimmed(path, k), 2, left, axes)
    rows = Rows(exporters.embeddings(k, lengths))
    outputs = loop(rows.whole, VISUAL)
    of = expected(text, head, rows, k, axes)
    for row, x in enumerate(rows.whole):
        logits, kept = of(row, x, VISUAL[row])
        shift = loop.shifts[row]
        assert outputs["kept_indices"][row].tolist() == [*range(shift), *(kept + shift)]
        close(outputs["logits"][row, shift:], logits)
    for step in range(32):
        new = exporters.embeddings(100 + step, (1, 1))
        rows.step(new)
        outputs = loop(new)
        if step % 8 in (0, 7):  # the oracle begins anew every time
            for row, x in enumerate(rows.whole):
                close(outputs["logits"][row, 0], of(row, x, VISUAL[row])[0][-1])


def close(have, want):
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("maker", QUICK)
def test_nothing_removed_is_bit_equal_with_the_untouched_file(made, maker):
    path, *_, plain = made(maker)
    left, axes = MAKERS[maker][1], 3 * maker.endswith("mrope")
    loops = Loop(plain, 2, left, axes), Loop(trimmed(path, 2, 0), 2, left, axes)
    for step in range(3):
        rows = exporters.embeddings(step, (1, 1) if step else LENGTHS if left else (12, 12))
        want, have = (loop(rows, None if step else VISUAL) for loop in loops)
        for name, value in want.items():
            np.testing.assert_array_equal(have[name], value, err_msg=name)


def test_from_python_as_from_the_command_line(made, tmp_path):
    path, *_ = made("traced")
    graph = session(FastV(k=2, r=0.5)(load(path)))
    rows = exporters.embeddings(0, LENGTHS)
    want, have = (Loop(each, 2)(rows, VISUAL) for each in (trimmed(path, 2), graph))
    for name, value in want.items():
        np.testing.assert_array_equal(have[name], value, err_msg=name)
