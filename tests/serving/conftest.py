"""The demo as a bundle of two slots, exported once a run."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    from vlmtrim.export import cli

    folder = tmp_path_factory.mktemp("served") / "demo"
    arguments = ["--model", "demo", "--k", "2", "--r", "0.5", "--dtype", "float32", "--max-batch", "2"]
    assert cli.main([*arguments, "--output", str(folder)]) == 0
    return folder
