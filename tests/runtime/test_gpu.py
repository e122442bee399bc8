"""What needs an NVIDIA GPU: pytest -m gpu."""

import pytest

from vlmtrim.export import check_cli
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import engines

pytestmark = pytest.mark.gpu


def test_onnxruntime_cuda_equals_pytorch(fastv_bundle):
    assert check_cli.main([str(fastv_bundle), "--backend", "ort-cuda"]) == 0


def test_engines_built_ahead_of_time_load(export_tiny):
    """TensorRT-RTX compiles the GPU part on the target; both profiles must be there."""
    bundle = open_bundle(export_tiny("engine", k=2, r=0.5, dtype="float16", engine="tensorrt-rtx", max_batch=2))
    trt = engines.import_library("tensorrt-rtx")
    engine = trt.Runtime(engines._logger(trt, [])).deserialize_cuda_engine(bundle.file("decoder.engine").read_bytes())
    assert engine is not None and engine.num_optimization_profiles == 2
