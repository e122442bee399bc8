"""Whatever a stranger changes in a bundle's JSON files: the C++ runtime runs it or says a sentence, nothing else."""

import json
import random
import shutil

import numpy as np
import probing
import pytest
import templates
import test_prompt
import test_tokenizer
from mutations import mutated_bytes, mutated_json
from probing import ProbeError

from vlmtrim.export import prompt_form
from vlmtrim.export.weights.tiny import SPECIAL_IDS, write_tokenizer
from vlmtrim.graphs.bundle import seal
from vlmtrim.runtime.image import generated_picture

COUNTS = [60, pytest.param(3000, marks=pytest.mark.slow)]


def damaged(source: str, draw: random.Random) -> bytes:
    """A JSON text with odd values, now and then with odd bytes."""
    text = json.dumps(mutated_json(json.loads(source), draw)).encode()
    return mutated_bytes(text, draw) if draw.random() < 0.2 else text


def refusals(attempts) -> int:
    """How many attempts end in a sentence; every other one must do its work."""
    count = 0
    for attempt in attempts:
        try:
            attempt()
        except ProbeError as refusal:
            assert 0 < len(str(refusal)) < 2000
            count += 1
    return count


@pytest.mark.parametrize("count", COUNTS)
def test_contracts(count, fastv_bundle, tmp_path):
    folder, draw = shutil.copytree(fastv_bundle, tmp_path / "bundle"), random.Random(1)
    source = (folder / "contract.json").read_text()

    def attempt():
        (folder / "contract.json").write_bytes(damaged(source, draw))
        seal(folder)
        probing.call("probe_bundle", str(folder).encode(), 0)

    assert refusals(attempt for _ in range(count)) > count / 2


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["llama3", "llama-legacy"])
def test_tokenizers(kind, count):
    source, draw = test_tokenizer.KINDS[kind]().to_str(), random.Random(2)
    texts = list(test_tokenizer.strings(5, 1))

    def attempt():
        native = test_tokenizer.Native(damaged(source, draw))
        for text in texts:
            native.decode(native.encode(text))
        native.stream([1, 5, 300, 2, 10**6])

    assert refusals(attempt for _ in range(count)) > count / 10


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", templates.FORMS)
def test_prompts(name, count, tmp_path):
    write_tokenizer(tmp_path, SPECIAL_IDS)
    (tmp_path / "chat_template.jinja").write_text(templates.FORMS[name])
    assert prompt_form.write_form(tmp_path, test_prompt.CONTRACT) is None
    source, draw = (tmp_path / "prompt.json").read_text(), random.Random(3)

    def attempt():
        (tmp_path / "prompt.json").write_bytes(damaged(source, draw))
        native = test_prompt.Native(tmp_path, draw.choice(["", "Be brief."]))
        native.ask(draw.choice([["Hi"], [None, "Hi"], ["a", None, "b"]]))
        native.answer(" Yes ")
        native.ask(["And?"])

    assert refusals(attempt for _ in range(count)) > count / 4


@pytest.mark.parametrize("family", ["llava", "mllama", "qwen2_5_vl"])
def test_image_settings(family, export_tiny, tmp_path):
    fields = {"method": "none", "images": 3} if family == "mllama" else {"k": 1, "r": 0.5}
    bundle = export_tiny("cpp-damage", family=family, **fields)
    folder, draw = shutil.copytree(bundle, tmp_path / "bundle"), random.Random(4)
    source = (folder / "preprocessor_config.json").read_text()
    picture = generated_picture(0).resize((50, 40))

    def attempt():
        (folder / "preprocessor_config.json").write_bytes(damaged(source, draw))
        seal(folder)
        native = probing.Native(folder)
        try:
            made = native.process([picture])
            assert all(np.isfinite(value).all() for value in made["inputs"].values())
        finally:
            native.close()

    assert refusals(attempt for _ in range(25)) > 3
