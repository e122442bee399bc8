"""README's table of what is proven, from the tests that passed: pytest --proven write, or --proven check.

With a GPU, ``-m gpu --proven write`` writes its columns; ``-m slow --proven write`` the rows that are slow to prove.
"""

from __future__ import annotations

from pathlib import Path

PROPERTY = "proves"
BEGIN, END = "<!-- proven: written by scripts/test.sh --proven write -->", "<!-- /proven -->"
README = Path(__file__).parents[1] / "README.md"
BACKENDS = (
    "ONNX Runtime CPU",
    "TensorRT-RTX engines",
    "TensorRT on a fake GPU",
    "ONNX Runtime CUDA",
    "TensorRT",
    "TensorRT-RTX",
)


def table(proven: set[tuple[str, str, str]]) -> str:
    """The table in Markdown; a combination that no test proves is not listed."""
    lines = [f"| family | method | {' | '.join(BACKENDS)} |", f"|---|---|{'---|' * len(BACKENDS)}"]
    for family, method in sorted({row[:2] for row in proven}):
        cells = ["proven" if (family, method, backend) in proven else "-" for backend in BACKENDS]
        lines.append(f"| {family} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def listed(text: str) -> set[tuple[str, str, str]]:
    """What README calls proven."""
    rows = [line.strip("| ").split(" | ") for line in text.split(BEGIN)[1].split(END)[0].splitlines() if "|" in line]
    names = rows[0][2:] if rows else []
    return {
        (family, method, backend)
        for family, method, *cells in rows[2:]
        for backend, cell in zip(names, cells, strict=True)
        if cell == "proven"
    }


def with_table(text: str, proven: set[tuple[str, str, str]]) -> str:
    """README with the table in its place."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table(proven)}\n{END}{rest.split(END)[1]}"


def pytest_addoption(parser):
    parser.addoption("--proven", choices=("check", "write"), help="README's table of what is proven, from this run")


def _left_out(marks: str, family: str, method: str, backend: str) -> bool:
    """Whether a run of tests with these marks is not to prove a combination: a slow one, or another in a slow run."""
    from parity import is_slow  # what it imports waits until the environment is set

    return marks == "slow" if not is_slow(family, method, backend) else "not slow" in marks


def _whole(config) -> bool:
    return config.args_source is config.ArgsSource.TESTPATHS


def pytest_sessionfinish(session):
    """On the process that all reports reach."""
    how = session.config.getoption("--proven")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if how is None or hasattr(session.config, "workerinput") or reporter is None:
        return
    passed = reporter.stats.get("passed", [])
    proven = {tuple(value) for report in passed for name, value in report.user_properties if name == PROPERTY}
    text = README.read_text()
    ran = {backend for _, _, backend in proven}  # the columns of others (those of GPUs, mostly) stay what they were
    marks = session.config.option.markexpr  # and so do rows that a run of these marks leaves out
    proven |= {row for row in listed(text) if row[2] not in ran or _left_out(marks, *row)}
    if how == "write" and (session.exitstatus or session.config.option.keyword or not _whole(session.config)):
        reporter.write_line("README's table is written from a whole run that passes", red=True)
        session.exitstatus = 1
    elif how == "write":
        README.write_text(with_table(text, proven))
    elif with_table(text, proven) != text:
        reporter.write_line(f"README's table differs from what this run proves:\n{table(proven)}", red=True)
        session.exitstatus = 1
