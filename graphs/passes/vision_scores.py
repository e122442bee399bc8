"""The vision graph also returns how much attention its last layer pays to every patch.

From its class token (FasterVLM, arXiv 2412.01818); where the tower has none, from all patches.
"""

from __future__ import annotations

import onnx_ir as ir

from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.tower import last_attention, paid

OUTPUT = "visual_attention"


def vision_scores(model: ir.Model, patches: int) -> ir.Model:
    """Add the output ``visual_attention`` float32 [I, P] in place, and return the model.

    Args:
        model: vision graph with the output ``image_features`` [I, P, D] and fused Attention nodes.
        patches: P, that become visual tokens.

    Raises:
        GraphError: its last attention is not over P tokens, or P and a class token before them.
    """
    ops = Ops("seen")
    seen = paid(ops, last_attention(model, patches), patches)
    seen.name, seen.type, seen.shape = OUTPUT, ir.TensorType(ir.DataType.FLOAT), ir.Shape(("I", patches))
    model.graph.extend(ops.nodes)
    model.graph.outputs.append(seen)
    model.graph.sort()
    return model
