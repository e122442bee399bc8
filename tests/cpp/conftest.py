"""What the tests of the C++ runtime share."""

import pytest


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory):
    """The shipped demo model with FastV, k = 2, r = 0.5."""
    from vlmtrim.export import cli

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    assert cli.main(["--model", "demo", "--k", "2", "--r", "0.5", "--output", str(folder)]) == 0
    return folder
