"""Bundles that several test files share; each is exported once a run."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only costs

import proven
import pytest
import shared_traces

pytest_addoption, pytest_sessionfinish = proven.pytest_addoption, proven.pytest_sessionfinish
# A file stays on one worker, so those that take longest come first; a long one at the end would have a worker wait.
LONGEST = """
test_families test_zipvl test_interrupted test_quantised test_rules test_tensorrt test_demo_accuracy test_packed
test_engines test_qwen test_mllama test_gptq test_image_settings test_cli test_chat test_parity test_wide_layers
test_llava_next test_guided test_batch_vlm test_ray_serve test_served_demo test_fuzz test_session test_gpu_report
test_run_cli test_large test_calibration
"""


def pytest_collection_modifyitems(items):
    """The longest files first, in this order; scripts/test.sh keeps xdist from sorting by the number of tests."""
    place = {name: number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture
def proves(record_property):
    """proves(family, method, backend), at the end of a test: what README's table may call proven."""
    return lambda family, method, backend: record_property(proven.PROPERTY, (family, method, backend))


@pytest.fixture(scope="session", autouse=True)
def trace_folder(tmp_path_factory):
    """Folder of the traces that all tests of a run share, whatever exports."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "traces"
    shared_traces.install(folder)
    return folder


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory, trace_folder):
    """Export a tiny random model: export_tiny("name", variant={...}, **fields of job and method) -> bundle folder."""
    from vlmtrim.export import checkpoint as checkpoints
    from vlmtrim.export import pipeline
    from vlmtrim.export.job import Job
    from vlmtrim.export.weights import tiny
    from vlmtrim.graphs.methods import make_method, parameters

    done, checkpoints_ = {}, {}
    shared_traces.install(trace_folder)

    def export(name, variant=None, family="llava", **fields):
        chosen = fields.pop("method", "fastv")
        given = {parameter: fields.pop(parameter) for parameter in parameters(chosen) if parameter in fields}
        fields = {"max_seq_len": 512, "method": make_method(chosen, **given), **fields}
        model = (family, repr(variant or {}))
        key = (name, model, repr(sorted(fields.items())))
        if model not in checkpoints_:
            folder = tmp_path_factory.mktemp("checkpoint")
            checkpoints_[model] = tiny.write_checkpoint(
                checkpoints.load_family(family), folder / "c", **(variant or {})
            )
        if key not in done:
            job = Job(model=str(checkpoints_[model]), output=str(tmp_path_factory.mktemp(name) / "bundle"), **fields)
            done[key] = pipeline.export(job, checkpoints_[model])
        return done[key]

    return export


@pytest.fixture(scope="session")
def fastv_bundle(export_tiny):
    """Llama with grouped-query attention, CLIP, k = 2, r = 0.5, two rows."""
    return export_tiny("fastv", k=2, r=0.5, max_batch=2)


@pytest.fixture(scope="session")
def dense_bundle(export_tiny):
    """The same model without selection."""
    return export_tiny("dense", method="none")


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A PNG with structure."""
    from vlmtrim.runtime.image import generated_picture

    path = tmp_path_factory.mktemp("picture") / "picture.png"
    generated_picture(7).save(path)
    return path
