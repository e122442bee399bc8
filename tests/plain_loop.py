"""Drives a decoder as any client of the common boundary does: present -> past by name; it knows nothing of removals."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def session(model) -> ort.InferenceSession:
    """Of a model or a file; shapes that contradict each other are errors of the graph, so warnings are shown."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # tiny matrices; a second thread spins beside the oracle's
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString() if isinstance(model, ir.Model) else str(model),
        options,
        providers=["CPUExecutionProvider"],
    )


class Loop:
    """One batch. ``padding``: filling tokens on the left, or on the right, by row."""

    def __init__(self, graph: ort.InferenceSession, rows: int, left: bool = True, axes: int = 0):
        self.graph, self.left, self.axes = graph, left, axes
        self.names = [i.name for i in graph.get_inputs()]
        self.tokens = next(i for i in graph.get_inputs() if i.name in ("inputs_embeds", "input_ids"))
        self.past = {
            i.name: np.zeros((rows, i.shape[1], 0, i.shape[3] if isinstance(i.shape[3], int) else 16), DTYPES[i.type])
            for i in graph.get_inputs()
            if i.name.startswith("past_key_values")
        }
        self.mask = np.zeros((rows, 0), np.int64)
        self.counts = np.zeros(rows, np.int64)

    def __call__(self, rows, visual=None) -> dict[str, np.ndarray]:
        """One step of rows of tokens (padded here) with places of visual tokens in the unpadded rows."""
        lengths = np.array([len(row) for row in rows])
        most = max(lengths)
        shifts = (most - lengths) * self.left
        dtype = DTYPES[self.tokens.type]
        tokens = np.zeros((len(rows), most, *np.shape(rows[0])[1:]), dtype)
        real, positions = np.zeros((len(rows), most), np.int64), np.zeros((len(rows), most), np.int64)
        for b, row in enumerate(rows):
            at = slice(shifts[b], shifts[b] + lengths[b])
            tokens[b, at], real[b, at] = row, 1
            positions[b, at] = self.counts[b] + np.arange(lengths[b])
        self.mask = np.concatenate([self.mask, real], 1)
        self.counts = self.counts + lengths
        given = np.array([[]] * len(rows) if visual is None else visual, np.int64).reshape(len(rows), -1)
        feeds = {
            self.tokens.name: tokens,
            "attention_mask": self.mask,
            "position_ids": np.stack([positions] * self.axes) if self.axes else positions,
            "visual_positions": given + shifts[:, None],
            **self.past,
        }
        outputs = self.graph.run(None, {name: feeds[name] for name in self.names})
        named = dict(zip([o.name for o in self.graph.get_outputs()], outputs, strict=True))
        self.past = {name: named[name.replace("past_key_values", "present")] for name in self.past}
        self.shifts, self.lengths = shifts, lengths
        return named
