"""A killed export leaves no bundle, and the next run leaves nothing else behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from vlmtrim.export import cli, pipeline
from vlmtrim.export.families import llava
from vlmtrim.export.job import Job
from vlmtrim.export.tracing import trace
from vlmtrim.export.weights import tiny
from vlmtrim.graphs import staging
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods.fastv import FastV

LAST = "rename"  # after the last stage: the finished folder takes its place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(llava, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def traces():
    return {}


def job(checkpoint, output, method=None, **fields):
    return Job(str(checkpoint), str(output), method or FastV(2, 0.5), max_seq_len=256, dtype="float16", **fields)


@pytest.fixture(scope="module")
def stages(checkpoint, traces, tmp_path_factory):
    """Every stage of an export, in order; the trace is done once here and shared by all runs below."""
    output = tmp_path_factory.mktemp("whole") / "bundle"
    folder = pipeline.export(job(checkpoint, output, **ENGINE), checkpoint, traces)
    names = list(json.loads((folder / "job.json").read_text())["stages"])
    return [*names, "checksums", LAST]


ENGINE = {"engine": "tensorrt-rtx", "engine_shards": 2}


def killed_at(stage, job, checkpoint, traces):
    """Export in a process that kills itself as it enters a stage; waits for its end."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        real = pipeline._stage

        @contextmanager
        def stop(report, name):
            if name == stage:
                die()
            with real(report, name) as show:
                yield show

        torch.set_num_threads(1)  # a fork has none of the threads that its parent had
        pipeline._stage = stop
        if stage == LAST:
            staging._rename = lambda *_: die()
        pipeline.export(job, checkpoint, traces)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_a_kill_at_any_stage_leaves_no_bundle_and_the_next_run_cleans_up(stages, checkpoint, traces, tmp_path):
    """The next run is the next that is killed: what it does not remove lies there beside what it leaves itself."""
    output, left = tmp_path / "bundle", set()
    for stage in stages:
        killed_at(stage, job(checkpoint, output, **ENGINE), checkpoint, traces)
        found = {path.name for path in tmp_path.glob(".bundle.partial-*")}
        assert not output.exists() and len(found) == 1 and not found & left, stage
        left = found
    pipeline.export(job(checkpoint, output), checkpoint, traces)
    assert os.listdir(tmp_path) == ["bundle"]
    assert open_bundle(output).contract.family == "llava"


@pytest.mark.parametrize("number", [0, 2, 5, 6, -2])
def test_a_kill_while_replacing_leaves_the_old_bundle_whole(stages, checkpoint, traces, tmp_path, number):
    output = tmp_path / "bundle"
    pipeline.export(job(checkpoint, output, method=FastV(r=0.25)), checkpoint, traces)
    killed_at(stages[number], job(checkpoint, output, force=True), checkpoint, traces)
    assert open_bundle(output).contract.removed == 0.25
    pipeline.export(job(checkpoint, output, force=True), checkpoint, traces)
    assert open_bundle(output).contract.removed == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_shared_trace_writes_the_same_files(checkpoint, traces, stages, tmp_path, monkeypatch):
    """What the accuracy report asks is what export-vlm makes: a trace of its own gives the same checksums. So do the
    traces that tests share."""
    assert traces, stages
    shared = pipeline.export(job(checkpoint, tmp_path / "shared", method=FastV(k=1)), checkpoint, traces)
    loaded = pipeline.export(job(checkpoint, tmp_path / "loaded", method=FastV(k=1)), checkpoint)
    monkeypatch.setattr(trace, "trace", trace.trace.real)
    alone = pipeline.export(job(checkpoint, tmp_path / "alone", method=FastV(k=1)), checkpoint)
    sums = [open_bundle(folder).sums for folder in (alone, shared, loaded)]
    for other in sums[1:]:
        assert {name for name in sums[0] if sums[0][name] != other[name]} == {"job.json"}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_ends_the_command_with_nothing_left(number, tmp_path):
    """Finding 21; what a kill -9 leaves in the temporary folder is for the next run (tests/graphs/test_staging.py)."""
    temporary, outputs = tmp_path / "tmp", tmp_path / "outputs"
    temporary.mkdir()
    outputs.mkdir()
    command = [
        sys.executable,
        "-m",
        "vlmtrim.export.cli",
        "--model",
        "demo",
        "--output",
        str(outputs / "deep" / "bundle"),
    ]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("trace decoder"):
                break
        assert os.listdir(outputs) == ["deep"] and len(os.listdir(temporary)) == 1
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == "export-vlm: interrupted; nothing was written"
    assert os.listdir(outputs) == os.listdir(temporary) == []


def test_who_ignores_a_hangup_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.ends_as_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_termination_is_an_interrupt_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, cli.ends_as_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) is before
