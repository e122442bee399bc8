"""Routes, streams, queue, failures and disconnects of serve-vlm, around an engine that says what it is told."""

from __future__ import annotations

import json
import re
import socket
import threading

import pytest
import scripted
import serving
from prometheus_client.parser import text_string_to_metric_families

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.serve.settings import Limits, Settings


@pytest.fixture(scope="module")
def bundle(fastv_bundle):
    return open_bundle(fastv_bundle)


@pytest.fixture
def engine():
    made = scripted.Engine()
    yield made
    made.held.set()


@pytest.fixture
def server(bundle, engine):
    with serving.running(Settings("tiny", queue=2), bundle, engine) as made:
        yield made


def metrics(server) -> dict[str, float]:
    text = server.get("/metrics").body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        s.name + "".join(f",{v}" for k, v in sorted(s.labels.items()) if k != "model_name"): s.value for s in samples
    }


def test_a_whole_answer(server):
    reply = server.ask("say 3", model="tiny")
    made = reply.json
    assert reply.status == 200 and reply.headers["x-request-id"] == made["id"]
    assert made["object"] == "chat.completion" and made["model"] == "tiny"
    assert made["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "0 1 ", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    own = {"visual_tokens": 0, "kept": 0, "removed": 0, "queued_s": 0.001, "prefill_s": 0.002, "decode_s": 0.003}
    assert made["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "vlmtrim": own}


def test_a_stream_word_for_word(server):
    """Requirement 3: role first, deltas, the reason with an empty delta, null before it, usage, [DONE]."""
    reply = server.ask("say 3", stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = reply.events
    head = {key: events[0][key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk"

    def chunk(delta, finish=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return head | {"choices": [choice], "usage": None}

    deltas = [{"role": "assistant", "content": ""}, {"content": "0 "}, {"content": "1 "}]
    assert events[:-1] == [*map(chunk, deltas), chunk({}, "stop")]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 8
    assert done == "[DONE]"
    *plain, _ = server.ask("say 2", stream=True).events
    assert all("usage" not in event for event in plain) and plain[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities(server, bundle):
    (choice,) = server.ask("say 2", logprobs=True, top_logprobs=2).json["choices"]
    (entry,) = choice["logprobs"]["content"]  # not of the token that ends it, which is no part of the text
    assert entry["logprob"] == -1.0 and [top["logprob"] for top in entry["top_logprobs"]] == [-1.0, -2.0]
    assert all(bytes(piece["bytes"]).decode() == piece["token"] for piece in [entry, *entry["top_logprobs"]])
    streamed = server.ask("say 2", logprobs=True, stream=True).events
    assert streamed[1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_paths(server):
    (model,) = server.get("/v1/models").json["data"]
    assert model["id"] == "tiny" and model["object"] == "model"
    assert server.get("/v1/models/tiny").json == model
    assert server.get("/v1/models/other").status == 404
    assert server.get("/health").json == {"status": "ready"}
    assert server.get("/health/ready").json == {"status": "ready", "slots": 2, "live": 0, "waiting": 0}
    page = server.get("/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "script-src 'sha256-" in page.headers["content-security-policy"]
    )
    assert not re.search(rb"(src|href)=.(https?:)?//", page.body)  # nothing is loaded
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)):
        reply = server.send(method, path, None, {})
        assert reply.status == status and reply.error["code"] == "not_found"


def test_six_clients_on_two_slots_and_two_places_are_two_refusals(server, engine):
    """Requirement 10."""
    engine.held.clear()
    replies: list[serving.Reply] = []
    threads = [threading.Thread(target=lambda: replies.append(server.ask("say 4"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    serving.eventually(lambda: len(replies) == 2)
    assert [r.status for r in replies] == [429, 429]
    assert all(r.headers["retry-after"] and r.error["type"] == "rate_limit_error" for r in replies)
    assert server.get("/health/ready").json | {"status": ""} == {"status": "", "slots": 2, "live": 2, "waiting": 2}
    assert metrics(server)["vllm:num_requests_waiting"] == 2
    engine.held.set()
    for thread in threads:
        thread.join()
    assert [r.json["choices"][0]["message"]["content"] for r in replies[2:]] == ["0 1 2 "] * 4
    assert engine.most_live == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server, engine, stream):
    """Requirement 11, while it waits and while it is answered."""
    engine.held.clear()
    gone = []
    for _ in range(4):
        connection = server.connect()
        body = json.dumps({"messages": [{"role": "user", "content": "say 100000"}], "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        gone.append(connection)
    serving.eventually(lambda: (engine.state().live, engine.state().waiting) == (2, 2))
    if stream:
        engine.pace = 0.001
        engine.held.set()
        serving.eventually(lambda: metrics(server)["vllm:time_to_first_token_seconds_count"] >= 2)
    for connection in gone:
        connection.close()
    engine.held.set()
    serving.eventually(lambda: (engine.state().live, engine.state().waiting) == (0, 0))
    serving.eventually(lambda: metrics(server)["vlmtrim:requests_refused_total,499"] == 4)
    assert [server.ask("say 2").status for _ in range(5)] == [200] * 5


def test_a_failing_request_harms_no_other(server, engine):
    """Requirement 12: while one streams, others fail in every way."""
    engine.held.clear()
    engine.pace = 0.005
    kept = []
    thread = threading.Thread(target=lambda: kept.append(server.ask("say 60", stream=True)))
    thread.start()
    serving.eventually(lambda: engine.state().live == 1)
    engine.held.set()
    refused = server.ask("refuse")
    assert refused.status == 500 and refused.error["message"] == "the model returned NaN"
    crashed = server.ask("crash", stream=True)
    assert crashed.status == 500
    assert crashed.error["message"] == "the model could not answer this request; others are not affected"
    failed = server.ask("fail", stream=True)
    assert failed.status == 200 and "error" in failed.events[-1] and failed.events[-2] != "[DONE]"
    assert server.ask("too long").error["message"] == "the prompt has 9999 tokens; shorten it"
    assert server.post(b"{").status == 400
    thread.join()
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in kept[0].events[:-1])
    assert text == "".join(f"{n} " for n in range(59))


def test_an_engine_that_broke_is_told_by_health(server, engine):
    assert server.ask("break").status == 503
    reply = server.ask("say 2")
    assert reply.status == 503 and reply.error["message"] == "the engine has stopped; the server must be restarted"
    assert server.get("/health").status == server.get("/health/ready").status == 503


def test_counters_grow_by_what_answers_tell(server):
    """Requirement 13."""
    replies = [server.ask("say 3"), server.ask("say 5", max_tokens=50)]
    streamed = server.ask("say 4", stream=True, stream_options={"include_usage": True}).events[-2]
    used = [reply.json["usage"] for reply in replies] + [streamed["usage"]]
    told = metrics(server)
    assert told["vllm:prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in used)
    assert told["vllm:generation_tokens_total"] == sum(usage["completion_tokens"] for usage in used) == 12
    assert told["vllm:time_to_first_token_seconds_count"] == told["vllm:request_success_total,stop"] == 3
    assert told["vllm:inter_token_latency_seconds_count"] == 12 - 3
    assert told["vllm:num_requests_running"] == 0 and told["vllm:kv_cache_usage_perc"] == 0.25


def test_not_ready_is_503(bundle):
    """Requirement 10, the other half: while the engine is being opened, and after it was told to stop."""
    opening = threading.Event()

    def open_slowly():
        opening.wait(10)
        return scripted.Engine()

    with serving.running(Settings("tiny"), bundle, open_slowly, ready=False) as server:
        assert server.get("/health").status == 200 and server.get("/health/ready").status == 503
        refused = server.ask("say 2")
        assert refused.status == 503 and refused.headers["retry-after"] and refused.error["code"] == "starting"
        opening.set()
        serving.eventually(lambda: server.get("/health/ready").status == 200)
        assert server.ask("say 2").status == 200
        server.client.status = "draining"
        assert server.ask("say 2").error["code"] == "draining"


def test_a_key_protects_all_paths_but_health(bundle, engine):
    """Requirement 14."""
    with serving.running(Settings("tiny", key="correct-horse"), bundle, engine) as server:
        for path in ("/", "/metrics", "/v1/models", "/health/ready", "/nope"):
            for headers in ({}, {"authorization": "Bearer correct-hors"}, {"authorization": "Basic !"}):
                reply = server.get(path, **headers)
                assert reply.status == 401 and reply.error["code"] == "invalid_api_key" and len(reply.body) < 300
            assert server.get(path, authorization="Bearer correct-horse").status in (200, 404)
        assert server.ask("say 2").status == 401
        assert server.get("/health").status == 200
        login = {"authorization": "Basic dTpjb3JyZWN0LWhvcnNl"}  # as a browser sends it: any name, the key
        assert server.get("/", **login).status == 200
        server.headers = {"authorization": "Bearer correct-horse"}
        assert server.ask("say 2").status == 200


def test_it_listens_on_this_machine_alone_by_default():
    from vlmtrim.runtime.serve.arguments import Parser

    assert Parser().parse_args(["b"]).host == "127.0.0.1"


def test_a_long_body_is_refused_before_it_is_kept(bundle, engine):
    """Requirement 5: by its length, and by what came where it states none."""
    with serving.running(Settings("tiny", limits=Limits(body_bytes=1 << 20)), bundle, engine) as server:
        refused = server.post(b" " * (3 << 20))
        assert refused.status == 413 and refused.error["code"] == "body_too_large"
        chunked = server.send(
            "POST", "/v1/chat/completions", iter([b" " * 65536] * 40), {"content-type": "application/json"}
        )
        assert chunked.status == 413
        assert server.post(b"{}", **{"content-type": "text/plain"}).status == 415
        assert server.post(b"{}", **{"content-type": "application/x-www-form-urlencoded"}).status == 415
        assert engine.prepared == [] and server.ask("say 2").status == 200


def test_a_body_that_does_not_come_gives_its_place_back(bundle, engine):
    with serving.running(Settings("tiny", queue=0, limits=Limits(body_seconds=1.5)), bundle, engine) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 90\r\n"
        )
        for connection in slow:
            connection.sendall(head + b"\r\n{")
        serving.eventually(lambda: server.ask("say 2").status == 429)
        assert b" 408 " in slow[0].recv(4096)
        serving.eventually(lambda: server.ask("say 2").status == 200)
        for connection in slow:
            connection.close()


def test_a_reader_that_does_not_read_holds_no_slot(server, engine):
    connection, _ = server.begin("say 20000")
    serving.eventually(lambda: engine.state().live == 0, 20)
    assert server.ask("say 2").status == 200
    connection.close()
