"""What the tests of the C++ runtime share."""

import pytest
import stand_ins


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory):
    """The shipped demo model with FastV, k = 2, r = 0.5."""
    from vlmtrim.export import cli

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    assert cli.main(["--model", "demo", "--k", "2", "--r", "0.5", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def place(export_tiny, monkeypatch, tmp_path):
    """Makes the machine of a library. Bundles come first: they are exported with the real library."""
    made = []

    def make(library="tensorrt"):
        made.append(stand_ins.Place(monkeypatch, tmp_path / "home", library))
        return made[-1]

    yield make
    for machine in made:
        assert machine.mistake == "" and machine.count("bytes") == 0
