"""Functions of transformers whose modules want torchvision, taken from their files."""

import ast
import inspect
from pathlib import Path

import transformers


def function_of(model, name, **space):
    """The function, or method, of this name in a model's video processor; ``space`` is what it finds by name."""
    folder = Path(inspect.getfile(transformers)).parent / "models" / model
    tree = ast.parse((folder / f"video_processing_{model}.py").read_text())
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    exec(ast.unparse(function), space)
    return space[name]
