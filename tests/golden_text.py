"""The nodes of a graph as text, a line each, held against a file."""

import os


def lines(nodes, indent=""):
    for node in nodes:
        inputs = ", ".join("" if value is None else str(value.name) for value in node.inputs)
        plain = {k: v.value for k, v in sorted(node.attributes.items()) if k not in ("value", "body")}
        made = ", ".join(str(value.name) for value in node.outputs)
        yield f"{indent}{made} = {node.op_type}({inputs}) {plain or ''}".rstrip()
        if "body" in node.attributes:
            yield from lines(node.attributes["body"].as_graph(), indent + "    ")


def assert_golden(nodes, path, prefix=""):
    """The nodes whose names begin so are those of the file; REGENERATE=1 pytest rewrites it."""
    text = "\n".join(lines(node for node in nodes if str(node.name).startswith(prefix))) + "\n"
    if os.environ.get("REGENERATE"):
        path.write_text(text)
    assert text == path.read_text()
