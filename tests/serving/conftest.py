"""The demo as a bundle of two slots, exported once a run, whichever worker is first."""

from __future__ import annotations

import fcntl
import os

import pytest


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    from vlmtrim.export import cli

    base = tmp_path_factory.getbasetemp()
    place = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "served"
    place.mkdir(exist_ok=True)
    folder = place / "demo"
    arguments = ["--model", "demo", "--k", "2", "--r", "0.5", "--dtype", "float32", "--max-batch", "2"]
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            assert cli.main([*arguments, "--output", str(folder)]) == 0
    return folder
