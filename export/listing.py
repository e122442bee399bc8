"""What there is: families, presets, methods, scores, and which method is proven for which family."""

from __future__ import annotations

import sys

from vlmtrim.export.arguments import methods_of
from vlmtrim.export.checkpoint import SHIPPED, family_names, presets
from vlmtrim.graphs.caches import fields_of, load_policy, policy_names
from vlmtrim.graphs.methods import method_names, parameters
from vlmtrim.graphs.rules import described


def combinations() -> dict[tuple[str, str], bool]:
    """(family, method) -> whether parity tests and an oracle hold it; other combinations are refused."""
    families = {name: methods_of(name) for name in family_names()}
    return {(name, method): method in proven for name, proven in families.items() for method in method_names()}


def text() -> str:
    """All of it for people."""
    lines = ["presets"]
    lines += [
        f"    {name:22} {where}" for name, where in {**dict.fromkeys(SHIPPED, "in the package"), **presets()}.items()
    ]
    lines += ["methods"]
    for name in method_names():
        flags = " ".join(f"--{parameter.replace('_', '-')}" for parameter in parameters(name))
        lines.append(f"    {name:22} {flags}")
    lines.append(f"    {'none':22} the unpruned model")
    lines.append("scores of fastv (--score)")
    lines += described()
    lines.append("cache policies (--cache), behind fastv, guided, zipvl and none")
    for name in policy_names():
        policy = load_policy(name)
        flags = " ".join(f"--cache-{parameter.replace('_', '-')}" for parameter in fields_of(policy))
        said = (sys.modules[policy.__module__].__doc__ or "").splitlines()[0].rstrip(".")
        lines.append(f"    {name:22} {said} {f'[{flags}]' if flags else ''}".rstrip())
    proven = combinations()
    lines.append(f"{'families':26} " + " ".join(f"{name:14}" for name in (*method_names(), "none")).rstrip())
    for family in family_names():
        cells = [*("proven" if proven[family, name] else "-" for name in method_names()), "proven"]
        lines.append(f"    {family:22} " + " ".join(f"{cell:14}" for cell in cells).rstrip())
    return "\n".join(lines)
