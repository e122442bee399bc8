"""Weights of checkpoints: read, bound to graphs, written; and checkpoints made on the spot."""

from vlmtrim.export.weights.files import (
    StoredTensor,
    bind,
    bytes_by_dtype,
    check_bindings,
    common_dtype,
    files_of,
    keeps_files,
    make_header,
    match_parameters,
    read_checkpoint,
    read_header,
    stored_dtypes,
)
from vlmtrim.export.weights.writing import Wanted, store

__all__ = [
    "StoredTensor",
    "Wanted",
    "bind",
    "bytes_by_dtype",
    "check_bindings",
    "common_dtype",
    "files_of",
    "keeps_files",
    "make_header",
    "match_parameters",
    "read_checkpoint",
    "read_header",
    "store",
    "stored_dtypes",
]
