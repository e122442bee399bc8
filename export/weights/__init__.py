"""Weights of checkpoints: read, bound to graphs, written; and checkpoints made on the spot."""

from vlmtrim.export.weights.files import (
    Progress,
    StoredTensor,
    bind,
    bytes_by_dtype,
    check_bindings,
    common_dtype,
    make_header,
    match_parameters,
    read_checkpoint,
    read_header,
    store,
)

__all__ = [
    "Progress",
    "StoredTensor",
    "bind",
    "bytes_by_dtype",
    "check_bindings",
    "common_dtype",
    "make_header",
    "match_parameters",
    "read_checkpoint",
    "read_header",
    "store",
]
