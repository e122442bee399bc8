"""Graph passes: ONNX in, ONNX out.

>>> from vlmtrim.graphs import FastV, load, save
>>> model = load("decoder.onnx")            # doctest: +SKIP
>>> save(FastV(k=2, r=0.5)(model), "pruned.onnx")  # doctest: +SKIP
"""

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.files import load, save
from vlmtrim.graphs.methods.fastv import FastV

__all__ = ["FastV", "GraphError", "load", "save"]
