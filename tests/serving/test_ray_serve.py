"""serve-vlm --ray with two replicas on the CPU: answers, limits, a client that leaves, a replica that dies, the end."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import processes
import pytest
import serving
import soak_server

from vlmtrim.runtime import cluster
from vlmtrim.runtime.errors import RuntimeRefusal

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
INSIDE = 3  # requests that one of the replicas takes: two slots, and one that waits
REPLICA = "x-vlmtrim-replica"


@pytest.fixture(scope="module")
def started(demo):
    arguments = ["--ray", "--replicas", "2", "--queue", str(INSIDE - 2), "--backend", "ort-cpu"]
    with soak_server.started(demo, *arguments) as made:
        yield made


@pytest.fixture(scope="module")
def server(started):
    return serving.Server(started.port)


@pytest.fixture(scope="module")
def talks(demo):
    """Conversations, and what each gets from the bundle alone."""
    asked = soak_server.conversations()
    return list(zip(asked, soak_server.alone(demo, asked), strict=True))


def ask(server, talk, stream=False) -> tuple[str, str]:
    """The answer's text, or its status where it is none, and who gave it."""
    reply = server.post({"messages": talk, "stream": stream})
    text = soak_server.said(reply.body, stream) if reply.status == 200 else str(reply.status)
    return text, reply.headers.get(REPLICA, "")


def test_every_answer_is_a_sessions_own_and_both_replicas_give_them(server, talks):
    seen: Counter[str] = Counter()
    for _ in range(10):
        with ThreadPoolExecutor(INSIDE) as pool:
            answers = pool.map(lambda n: ask(server, talks[n][0], n % 2 == 0), range(len(talks)))
            for (text, replica), (_, expected) in zip(answers, talks, strict=True):
                assert text == expected
                seen[replica] += 1
        if len(seen) == 2:
            return
    pytest.fail(f"requests went to {dict(seen)}")


def test_the_same_routes_and_errors(server, started):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo"]
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "a"}], n=2)
    assert server.get("/health/ready").json["slots"] == 2 and b"<html" in server.get("/").body
    assert b"vllm:generation_tokens_total" in server.get("/metrics").body
    assert any("is ready on http://127.0.0.1:" in line and "(2 replicas)" in line for line in started.lines)


def test_beyond_slots_and_queues_requests_are_refused_in_openais_shape(server, talks):
    talk, expected = talks[0]
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: server.post({"messages": talk}), range(40)))
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) == {200, 429} and statuses[200] >= INSIDE
    for reply in replies:
        if reply.status == 200:
            assert reply.json["choices"][0]["message"]["content"] == expected
        else:
            assert reply.error["code"] == "queue_full" and int(reply.headers["retry-after"]) >= 1


def test_a_client_that_leaves_frees_its_slot(server, started):
    for _ in range(100):  # the demo's answers are short: some end before their client is missed
        connection, answer = server.begin("Say. Say. Say.", max_tokens=300, temperature=2.0, seed=103, logprobs=True)
        assert answer.readline().startswith(b"data: ")
        answer.close()
        connection.close()
        if any("499 the client went away" in line for line in started.lines):
            break
    serving.eventually(lambda: any("499 the client went away" in line for line in started.lines))
    serving.eventually(lambda: not any(server.get("/health/ready").json["live"] for _ in range(20)))  # of both replicas


def replicas_of(started) -> list[int]:
    return processes.below(started.process.pid, b"ray::ServeReplica")


def test_a_replica_that_dies_is_replaced_while_the_other_answers(server, started, talks):
    talk, expected = talks[0]
    before = replicas_of(started)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    answers, end = [], time.monotonic() + 60
    while len(set(replicas_of(started)) - set(before)) < 1 or len(answers) < 20:
        answers.append(ask(server, talk)[0])
        assert time.monotonic() < end
    assert set(answers) <= {expected, "500", "503"} and answers.count(expected) >= 15
    assert [ask(server, talk)[0] for _ in range(5)] == [expected] * 5


def test_a_signal_lets_answers_end(server, started, talks):
    """The last test of this server. Whoever is inside when the signal comes gets the whole answer."""
    (talk, expected), answers = talks[0], []

    def go_on(number: int) -> None:
        while (said := ask(server, talk, number % 2 == 0)[0]) == expected:
            answers.append(said)
        answers.append(said)

    with ThreadPoolExecutor(INSIDE) as pool:
        asking = [pool.submit(go_on, number) for number in range(INSIDE)]
        serving.eventually(lambda: len(answers) >= 10)
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(30) == 0
        ends = [one.exception() for one in asking]
    assert all(end is None or isinstance(end, ConnectionRefusedError) for end in ends), ends
    assert set(answers) - {expected} <= {"404", "503"}, Counter(answers)
    assert not any("Traceback" in line for line in started.lines)


@pytest.mark.parametrize("text", ["0", "3:2", "two", "1:", "-1", "1:2:3", ""])
def test_numbers_of_replicas_that_are_none(text):
    with pytest.raises(RuntimeRefusal, match="--replicas is"):
        cluster.replicas(text)


def test_numbers_of_replicas():
    assert [cluster.replicas(text) for text in (None, "3", "1:4")] == [(1, 1), (3, 3), (1, 4)]


def test_what_a_cluster_cannot_deploy_is_said_in_a_sentence(demo, tmp_path):
    from vlmtrim.runtime.serve.ray import app

    for arguments, said in [
        ({}, "add bundle=FOLDER"),
        ({"bundle": str(demo), "copies": "2"}, "unrecognized arguments: --copies=2"),
        ({"bundle": str(demo), "queue": "-1"}, "--queue is -1"),
        ({"bundle": str(demo), "replicas": "4:1"}, "--replicas is 4:1"),
    ]:
        with pytest.raises(RuntimeRefusal, match=said):
            app(arguments)
    with pytest.raises(ValueError, match="none"):
        app({"bundle": str(tmp_path / "none")})


def test_arguments_of_ray_want_ray(demo):
    command = [sys.executable, "-m", "vlmtrim.runtime.serve.cli", str(demo)]
    for arguments, said in [
        (["--replicas", "2"], "--replicas is of a deployment with Ray; give --ray as well"),
        (["--ray", "--address", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1"),
    ]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_serve_run_on_a_cluster_and_what_a_replica_refuses(demo):
    """Ray's own commands: a cluster is started, an application deployed by our builder, joined by serve-vlm."""
    port, dashboard = "6399", "8299"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    folder = Path(sys.executable).parent
    head = ["--head", "--port", port, "--num-cpus", "4", "--dashboard-port", dashboard, "--block"]
    running = subprocess.Popen([folder / "ray", "start", *head], env=environment, stdout=subprocess.DEVNULL)
    try:
        address = f"127.0.0.1:{port}"
        serving.eventually(lambda: not refuses(address), 30)
        target = ["vlmtrim.runtime.serve.ray:app", f"bundle={demo}", "replicas=1:2", "backend=ort-cpu", "quiet=true"]
        served = subprocess.Popen([folder / "serve", "run", "--address", address, *target], env=environment)
        server = serving.Server(8000)
        serving.eventually(lambda: answers(server), 60)
        served.send_signal(signal.SIGINT)
        served.wait(60)
        command = [sys.executable, "-m", "vlmtrim.runtime.serve.cli", str(demo), "--ray", "--address", address]
        done = subprocess.run([*command, "--slots", "3"], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "batch 3 is outside the bundle's 1 to 2" in done.stderr
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(60)


def refuses(address: str) -> bool:
    try:
        cluster._check_address(address)
    except RuntimeRefusal as error:
        return bool(re.search("no Ray cluster", str(error)))
    return False


def answers(server) -> bool:
    try:
        return server.get("/health/ready").status == 200
    except OSError:
        return False
