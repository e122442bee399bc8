"""export-vlm --list says what is proven; what is called proven has an oracle, goldens and a parity run."""

from pathlib import Path

import proven
import pytest

from vlmtrim.export import cli, listing, oracles
from vlmtrim.export.arguments import methods_of
from vlmtrim.export.checkpoint import family_names, presets
from vlmtrim.graphs.methods import method_names
from vlmtrim.graphs.rules import rule_names

GOLDEN = Path(__file__).parents[1] / "graphs" / "golden"
ORACLES = Path(oracles.__file__).parent
# What each method's selection must look like, node by node.
GOLDENS = {
    "fastv": ("losers", "stride", "winners"),
    "guided": ("losers", "winners"),  # of scores that are given
    "pyramid": ("pyramid",),
    "tidal": ("tidal",),
    "trimmed-llama": ("trimmed-llama",),
    "visionzip": ("visionzip",),
    "zipvl": ("zipvl",),
}


def test_the_list_names_all_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--list"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in (*family_names(), *method_names(), *presets(), "--ratio", "--score"):
        assert name in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    order = rows["families"]
    for (family, method), is_proven in listing.combinations().items():
        assert (rows[family][order.index(method)] == "proven") == is_proven


@pytest.mark.parametrize("family", family_names())
def test_what_is_called_proven_is_held_by_an_oracle_and_goldens(family):
    """The parity test runs every family with the methods for it (parity.combinations)."""
    methods = methods_of(family)
    assert methods and set(methods) <= set(method_names())
    assert all((ORACLES / f"{method.replace('-', '_')}.py").is_file() for method in methods)
    assert all((GOLDEN / f"{name}.txt").is_file() for method in methods for name in GOLDENS[method])


def test_readmes_table_lists_every_combination_and_reads_back():
    rows = {("a_b", "c", proven.BACKENDS[0]), ("a_b", "none", proven.BACKENDS[-1])}
    text = proven.with_table(f"before{proven.BEGIN}\nold\n{proven.END}after", rows)
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert proven.listed(text) == rows
    listed = {(family, method) for family, method, _ in proven.listed(proven.README.read_text())}
    known = {pair for pair, is_proven in listing.combinations().items() if is_proven}
    assert listed == known | {(family, "none") for family in family_names()}


def test_every_rule_has_an_oracle():
    assert [rule.replace("-", "_") for rule in rule_names()] == sorted(
        path.stem for path in (ORACLES / "rules").glob("[!_]*.py")
    )
