"""Changes that a hostile or careless hand may make to a bundle, drawn from a seed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import onnx

Files = dict[str, bytes]
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 255, 65535, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(0.0, -0.5, 0.999, 1.5, 1e-30, 1e308, -1e308, "", "x", "x" * 5000, "../x", "/etc/passwd", "\0", "\ud800", "NaN"),
    *([], {}, [[]], [1, 2, 3], {"a": 1}, "float32", "int64", "images", "tokens", "B", "N"),
]
TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages[0].content[0].text.__class__ }}",
    "{{ messages }}{{ bos_token * 99 }}",
    "{{ image_token * 50 }}",
    "",
]
# What of an ONNX file is changed: fields that a loader or a kernel computes with.
_ACTIONS = ["operator", "attribute", "dims", "external", "edge", "remove", "boundary", "constant", "type"]
_OPERATORS = ["Add", "Reshape", "Gather", "Slice", "Expand", "TopK", "Attention", "Loop", "If", "NoSuchOp", "Identity"]


def mutate(files: Files, draw: random.Random) -> tuple[str, Files, dict[str, str]]:
    """(what was done, the files afterwards, names that are no plain file and what they are instead)."""
    files, odd = dict(files), {}
    kind = draw.choice(["json", "json", "json", "json", "text", "bytes", "onnx", "onnx", "header", "odd", "sums"])
    if kind == "json":
        name = draw.choice([n for n in sorted(files) if n.endswith(".json")])
        files[name] = json.dumps(mutated_json(json.loads(files[name]), draw)).encode()
    elif kind == "text":
        name = draw.choice([n for n in sorted(files) if n.endswith((".jinja", ".json"))])
        files[name] = mutated_text(files[name], draw, name.endswith(".jinja"))
    elif kind == "bytes":
        name = draw.choice(sorted(files))
        files[name] = mutated_bytes(files[name], draw)
    elif kind == "onnx":
        name = draw.choice([n for n in sorted(files) if n.endswith(".onnx")])
        files[name] = mutated_onnx(files[name], draw)
    elif kind == "header":
        name = next(n for n in sorted(files) if n.endswith(".safetensors"))
        files[name] = mutated_header(files[name], draw)
    elif kind == "odd":
        name = draw.choice(sorted(files))
        odd[name] = draw.choice(["link", "dangling", "zero", "fifo", "folder", "missing", "outside"])
    else:
        name = "SHA256SUMS"
    return f"{kind} {name}", files, odd


def mutated_json(value: Any, draw: random.Random) -> Any:
    """One to three changes at random places."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return draw.choice(STRANGE)
        holder, key = draw.choice(places)
        action = draw.choice(["strange", "strange", "near", "near", "delete", "double", "add", "deep"])
        found = holder[key]
        if action == "delete":
            del holder[key]
        elif action == "near" and isinstance(found, int | float) and not isinstance(found, bool):
            holder[key] = draw.choice(
                [found + 1, found - 1, found * 2, -found, found * 1000, found // 2, 0, found + 0.5]
            )
        elif action == "near" and isinstance(found, str):
            holder[key] = draw.choice([found + "x", found[:-1], found.upper(), found * 100, "../" + found])
        elif action == "double" and isinstance(holder, list):
            holder.extend(holder)
        elif action == "add" and isinstance(holder, dict):
            holder[draw.choice(["x", "schema", "file", "most", "removed"])] = draw.choice(STRANGE)
        elif action == "deep":
            holder[key] = _nested(draw)
        else:
            holder[key] = copy.deepcopy(draw.choice(STRANGE))
    return value


def _nested(draw: random.Random) -> Any:
    value: Any = 0
    for _ in range(draw.choice([3, 62, 200])):
        value = [value]
    return value


def _places(value: Any) -> Any:
    """(holder, key) of everything inside; of long lists and vocabularies a part."""
    stack = [value]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        for key in keys[:60]:
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


def mutated_text(data: bytes, draw: random.Random, template: bool) -> bytes:
    """Pieces cut, doubled or put in, also such that are no UTF-8."""
    if template and draw.random() < 0.5:
        return draw.choice(TEMPLATES).encode()
    at, size = draw.randrange(len(data) + 1), draw.randrange(1, 40)
    piece = draw.choice([b"", data[at : at + size] * 2, b"\xff\xfe", b"[" * 3000, b'"', b"{{", b"%}", b"\0", b"NaN"])
    return data[:at] + piece + data[at + size :]


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bits flipped, an end cut off or put on, or nothing left."""
    action = draw.choice(["flip", "flip", "flip", "cut", "grow", "empty"])
    if action == "empty" or not data:
        return b""
    if action == "cut":
        return data[: draw.randrange(len(data))]
    if action == "grow":
        return data + draw.randbytes(draw.randrange(1, 100))
    changed = bytearray(data)
    for _ in range(draw.choice([1, 3, 20])):
        changed[draw.randrange(min(len(changed), draw.choice([64, 4096, len(changed)])))] = draw.randrange(256)
    return bytes(changed)


def mutated_header(data: bytes, draw: random.Random) -> bytes:
    """The header of a safetensors file: its length, or an entry."""
    if draw.random() < 0.3:
        return draw.choice([0, 1, 2**32, 2**63, len(data)]).to_bytes(8, "little") + data[8:]
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(mutated_json(json.loads(data[8 : 8 + size]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutated_onnx(data: bytes, draw: random.Random) -> bytes:
    """One to three fields of an ONNX file."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(draw.choice([1, 1, 2, 3])):
        graph = model.graph
        action = draw.choice(_ACTIONS)
        node = graph.node[draw.randrange(len(graph.node))] if graph.node else None
        weight = graph.initializer[draw.randrange(len(graph.initializer))] if graph.initializer else None
        if action == "operator" and node is not None:
            node.op_type = draw.choice(_OPERATORS)
        elif action == "attribute" and node is not None and node.attribute:
            _change_attribute(node.attribute[draw.randrange(len(node.attribute))], draw)
        elif action == "dims" and weight is not None and weight.dims:
            weight.dims[draw.randrange(len(weight.dims))] = draw.choice([0, 1, 3, 10**6, 2**31, 2**62, -1])
        elif action == "external" and weight is not None and weight.external_data:
            entry = weight.external_data[draw.randrange(len(weight.external_data))]
            entry.value = draw.choice(
                ["0", "-1", "1", "99999999999", str(2**63), "x", "../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", ""]
            )
        elif action == "edge" and node is not None and node.input:
            names = [name for other in graph.node[:200] for name in other.output]
            node.input[draw.randrange(len(node.input))] = draw.choice([*names, "", "nowhere"])
        elif action == "remove" and node is not None:
            graph.node.remove(node)
        elif action == "boundary":
            values = draw.choice([graph.input, graph.output])
            value = values[draw.randrange(len(values))]
            if draw.random() < 0.5 and value.type.tensor_type.shape.dim:
                dims = value.type.tensor_type.shape.dim
                dims[draw.randrange(len(dims))].dim_value = draw.choice([0, 1, 5, 10**6])
            else:
                value.name += "x"
        elif action == "constant" and node is not None:
            for attribute in node.attribute:
                if attribute.t.raw_data:
                    attribute.t.raw_data = draw.randbytes(len(attribute.t.raw_data))
        elif action == "type" and weight is not None:
            weight.data_type = draw.choice([0, 1, 2, 7, 10, 16, 99])
    return model.SerializeToString()


def _change_attribute(attribute: Any, draw: random.Random) -> None:
    number = draw.choice([0, 1, -1, 2, 7, 64, 10**6, 2**31, 2**62])
    if attribute.HasField("i"):
        attribute.i = number
    elif attribute.HasField("f"):
        attribute.f = draw.choice([0.0, float("nan"), float("inf"), -1e30])
    elif attribute.ints:
        attribute.ints[draw.randrange(len(attribute.ints))] = number
    else:
        attribute.name = draw.choice(["axis", "perm", "to", "x"])


def write(folder: Path, files: Files, odd: dict[str, str], sealed: bool, sums: bytes, draw: random.Random) -> None:
    """Write a mutant; ``sealed`` computes its checksums anew, as an attacker would."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if sealed:
        lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items())]
        sums = "".join(lines).encode()
    (folder / "SHA256SUMS").write_bytes(sums)
    for name, kind in odd.items():
        path = folder / name
        outside = folder.with_name(folder.name + ".outside")
        outside.write_bytes(files[name])
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "missing":
            path.symlink_to({"zero": "/dev/zero", "dangling": "nowhere", "link": name}.get(kind, outside))


def mutated_sums(sums: bytes, draw: random.Random) -> bytes:
    """Lines dropped, doubled, or changed."""
    lines = sums.splitlines(keepends=True)
    line = draw.randrange(len(lines))
    action = draw.choice(["drop", "double", "text", "name"])
    if action == "drop":
        del lines[line]
    elif action == "double":
        lines.insert(line, lines[line])
    elif action == "name":
        lines[line] = lines[line][:66] + draw.choice(
            [b"../x\n", b"/etc/passwd\n", b"x" * 300 + b"\n", b"\xff\n", b"\n"]
        )
    return mutated_text(b"".join(lines), draw, False) if action == "text" else b"".join(lines)
