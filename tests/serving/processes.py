"""Processes of a command that starts others, as Ray does."""

from __future__ import annotations

from pathlib import Path


def below(ancestor: int, begins: bytes) -> list[int]:
    """Ids of processes that descend from one and whose command line begins so."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(begins):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return [pid for pid in found if ancestor in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    above: set[int] = set()
    while pid := parents.get(pid, 0):
        above.add(pid)
    return above
