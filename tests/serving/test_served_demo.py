"""serve-vlm itself with the demo: clients that nobody here wrote, its page in Chromium, soak, kill and restart."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import serving
import soak_server
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from serving import data_url, image_part, text_part

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.generate import Image as Shown
from vlmtrim.runtime.generate import Prompt
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.serve.settings import Settings
from vlmtrim.runtime.slots import Engine, Message

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "export" / "demo" / "examples"
WORD = EXAMPLES / "word.png"
QUESTION = "Which word is written?"


@pytest.fixture(scope="module")
def started(demo):
    with soak_server.started(demo) as made:
        yield made


@pytest.fixture(scope="module")
def server(started):
    return serving.Server(started.port)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", _strict_response_validation=True, max_retries=0)


def asking(*pictures: Path, text: str = QUESTION) -> dict:
    return {"role": "user", "content": [text_part(text), *[image_part(p.read_bytes()) for p in pictures]]}


def test_openai_client_whole_and_streamed(client):
    """Requirements 1 and 3, with strict parsing of every chunk."""
    made = client.chat.completions.create(model="demo", messages=[asking(WORD)], logprobs=True, top_logprobs=3)
    (choice,) = made.choices
    assert choice.message.content == "sun" and choice.finish_reason == "stop"
    (entry,) = choice.logprobs.content
    assert entry.token.strip() == "sun" and entry.logprob == max(top.logprob for top in entry.top_logprobs) > -0.7
    own = made.usage.model_extra["vlmtrim"]
    assert (own["visual_tokens"], own["kept"], own["removed"]) == (144, 72, 72) and own["prefill_s"] > 0
    assert made.usage.prompt_tokens > 144
    said = {"role": "assistant", "content": "sun"}
    talk = [asking(WORD), said, {"role": "user", "content": "What colour is the word?"}]
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=talk, stream=True, stream_options={"include_usage": True}, max_completion_tokens=9
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "red"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens >= 2
    assert [model.id for model in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"


def test_openai_client_errors(client):
    with pytest.raises(openai.NotFoundError, match="there is demo"):
        client.chat.completions.create(model="gpt", messages=[asking(WORD)])
    with pytest.raises(openai.BadRequestError, match="n is not supported") as caught:
        client.chat.completions.create(model="demo", messages=[asking(WORD)], n=2)
    assert caught.value.param == "n" and caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="at most 1024 of them"):
        client.chat.completions.create(model="demo", messages=[asking(*[WORD] * 9)])


def test_settings_of_an_answer(client):
    """Requirement 2: limits, stop texts and seeds do what they say."""

    def answer(**fields):
        return client.chat.completions.create(model="demo", messages=[asking(WORD)], **fields)

    short = answer(max_tokens=9, max_completion_tokens=1)
    assert short.usage.completion_tokens == 1 and short.choices[0].finish_reason == "length"
    stopped = answer(stop=["u"])
    assert stopped.choices[0].message.content == "s" and stopped.choices[0].finish_reason == "stop"
    hot = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 5}
    drawn = [answer(seed=seed, **hot).choices[0].message.content for seed in (1, 1, 2, 3, 4, 5)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_readme_lines(server):
    """What README's section has people type, on this server's port."""
    section = (ROOT / "README.md").read_text().split("## Serve")[1].split("\n## ")[0]
    found = re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL)
    blocks = [(kind, block) for kind, block in found if "127.0.0.1" in block]
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash"]
    for kind, block in blocks:
        text = block.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace('"demo-fastv-k2-r0.5"', '"demo"')
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-ec", text]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("vlmtrim:visual_tokens_removed_total" if "/metrics" in block else "sun") in done.stdout


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_control_tokens_of_users_are_text(demo, pictures):
    """Requirement 9: with them in the words there is no more control token than without, and an answer."""
    contract, image = open_bundle(demo).contract, generated_picture(1)
    control = {contract.image_token_id, *contract.eos_token_ids}
    with engine_of(demo) as engine:

        def count(text: str) -> int:
            content = Prompt(*[Shown(image)] * pictures, text) if pictures else text
            request = engine.prepare([Message("user", content)], max_new_tokens=2)
            assert request.visual == request.ids.count(contract.image_token_id) == 144 * pictures
            assert list(engine.submit(request))[-1].ended
            return sum(token in control for token in request.ids)

        for marks in ("<image>", "</s>", "<|im_end|>", "<image><image> </s> <s>", "<|image_pad|>"):
            assert count(f"a {marks} b") == count("a b")


@contextlib.contextmanager
def engine_of(demo):
    with Engine(open_bundle(demo), make_backend("ort-cpu", 1)) as engine:
        yield engine


def test_a_huge_picture_delays_nobody(demo):
    """Requirement 15: while 60 million pixels are decoded again and again, another's tokens come on."""
    file = io.BytesIO()
    Image.new("RGB", (10_000, 6_000), "teal").save(file, "PNG")
    part = image_part(file.getvalue())
    huge = json.dumps({"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}).encode()
    replies: list[tuple[int, float]] = []
    with engine_of(demo) as engine, serving.running(Settings("demo"), open_bundle(demo), lambda: engine) as server:

        def send() -> None:
            for _ in range(4):
                began = time.perf_counter()
                replies.append((server.post(huge).status, time.perf_counter() - began))

        def gaps(enough) -> list[float]:
            found: list[float] = []
            while not enough(found):
                found += [b - a for a, b in itertools.pairwise(stream_times(server))]
            return found

        alone = gaps(lambda found: len(found) >= 100)
        sender = threading.Thread(target=send)
        sender.start()
        beside = gaps(lambda found: len(replies) == 4)
        sender.join()
    assert [status for status, _ in replies] == [200] * 4
    slowest = [statistics.quantiles(found, n=100)[98] for found in (alone, beside)]
    decoding = min(seconds for _, seconds in replies)
    print(
        f"gap between tokens, p99 of {len(alone)} and {len(beside)}: {slowest[0]:.4f} s alone, {slowest[1]:.4f} s "
        f"beside pictures that take {decoding:.2f} s"
    )
    assert slowest[1] < slowest[0] + decoding / 4


def stream_times(server) -> list[float]:
    """When each event of a streamed answer came; log-probabilities make every token an event."""
    connection, answer = server.begin("Say. Say. Say.", max_tokens=30, temperature=2.0, seed=3, logprobs=True)
    times = []
    while line := answer.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    connection.close()
    return times


def test_start_to_ready_is_quick(started):
    assert started.ready < 2.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def soak(demo, requests: int, cancelled: int, hostile: float) -> None:
    talks = soak_server.conversations()
    expected = soak_server.alone(demo, talks)
    assert len(set(expected)) > 5
    with soak_server.started(demo, "--quiet") as server:
        run = soak_server.Soak(server, talks, expected)
        run.run(requests, 8, cancelled, hostile, seed=3)
        state = run.idle()
    assert run.wrong == [] and (state["live"], state["waiting"]) == (0, 0)
    if requests >= 1000:
        assert run.growth() <= soak_server.GROWTH


def test_a_short_soak(demo):
    soak(demo, 40, 12, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("cancelled", "hostile"), [(0, 0.0), (300, 0.0), (300, 0.05)])
def test_a_long_soak(demo, cancelled, hostile):
    """Requirement 11 among them."""
    soak(demo, 1000, cancelled, hostile)


def test_kill_and_restart(demo):
    """Clients get an error, and the next server takes the same port at once."""
    with soak_server.started(demo) as first:
        connection = first.connect()
        body = {"messages": [asking(WORD)], "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), soak_server.JSON)
        first.process.kill()
        with pytest.raises((OSError, http.client.HTTPException)):
            if b"[DONE]" in connection.getresponse().read():
                raise ConnectionError("it was quicker than the signal")
        first.process.wait()
        with soak_server.started(demo, "--port", str(first.port)) as second:
            assert second.port == first.port
            reply = serving.Server(second.port).post({"messages": [asking(WORD)]})
            assert reply.json["choices"][0]["message"]["content"] == "sun"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_let_answers_end(demo, number):
    with soak_server.started(demo, "--grace", "20") as server:
        answers: list[serving.Reply] = []
        body = {"messages": [asking(WORD)]}
        asked = [
            threading.Thread(target=lambda: answers.append(serving.Server(server.port).post(body))) for _ in range(6)
        ]
        for thread in asked:
            thread.start()
        time.sleep(0.05)
        server.process.send_signal(number)
        for thread in asked:
            thread.join()
        assert server.process.wait(20) == 0
    assert answers and {reply.status for reply in answers} <= {200, 503}
    assert all(r.status == 503 or r.json["choices"][0]["message"]["content"] == "sun" for r in answers)


def refused(*arguments: str) -> str:
    command = [sys.executable, "-m", "vlmtrim.runtime.serve.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr


def test_what_cannot_be_served_is_said_in_a_sentence(demo, server, tmp_path):
    assert "cannot listen" in refused(str(demo), "--port", str(server.port))
    assert "--queue is -1" in refused(str(demo), "--queue", "-1")
    assert "batch 3 is outside" in refused(str(demo), "--slots", "3", "--port", "0")
    assert "serve-vlm: " in refused(str(tmp_path / "none"))
    (tmp_path / "key").write_text("short")
    assert "holds no key" in refused(str(demo), "--api-key-file", str(tmp_path / "key"))


WITHOUT = """
import importlib.util, sys
import vlmtrim.runtime, vlmtrim.runtime.slots, vlmtrim.runtime.serve.cli as cli
assert not {"starlette", "uvicorn", "prometheus_client"} & set(sys.modules)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "uvicorn" else real(name, *rest)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_runtime_imports_none_of_it_and_says_what_is_missing(demo):
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(demo)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "serve-vlm: serve-vlm needs uvicorn; install them with: pip install 'vlmtrim[serve]'\n"


@pytest.fixture(scope="module", params=["wide", "phone"])
def browser(request):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if request.param == "phone":
        options.add_experimental_option(
            "mobileEmulation", {"deviceMetrics": {"width": 390, "height": 800, "pixelRatio": 2, "touch": True}}
        )
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def until(browser, condition):
    return WebDriverWait(browser, 20).until(lambda _: condition())


def found(browser, what: str):
    return browser.find_element(By.CSS_SELECTOR, what)


PATCHES = """
const canvas = document.querySelector('#shown canvas'), paint = canvas.getContext('2d'), found = [];
for (let row = 0; row < 12; row++) for (let column = 0; column < 12; column++) {
  const x = Math.floor((column + .5) * canvas.width / 12), y = Math.floor((row + .5) * canvas.height / 12);
  found.push([...paint.getImageData(x, y, 1, 1).data.slice(0, 3)]);
}
return found;
"""


def test_the_page(server, browser):
    """Upload, ask, an answer, kept patches bright and removed ones dimmed, heat, errors as sentences; nothing else is
    loaded, and it fits a phone."""
    browser.get(server.url)
    until(browser, lambda: "demo" in found(browser, "#model").text)
    found(browser, "#file").send_keys(str(WORD))
    until(browser, lambda: found(browser, "#shown img").is_displayed())
    found(browser, "#question").send_keys(QUESTION)
    found(browser, "#ask").click()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#shown canvas"))
    until(browser, lambda: "144, 72 kept, 72 saved (50 %)" in found(browser, "#numbers").text)
    assert found(browser, "#talk .assistant").text == "sun" and found(browser, "#error").text == ""
    reply = server.post({"messages": [asking(WORD)], "vlmtrim": {"show_kept": True}})
    (sent,) = reply.json["vlmtrim"]["pictures"]
    assert (sent["rows"], sent["columns"], sum(sent["kept"])) == (12, 12, 72) and len(sent["scores"]) == 144
    kept = browser.execute_script(PATCHES)
    found(browser, "[value=picture]").click()
    plain = until(browser, lambda: (now := browser.execute_script(PATCHES)) != kept and now)
    for share, shown, before in zip(sent["kept"], kept, plain, strict=True):
        expected = [value if share else value * 0.22 for value in before]
        assert all(abs(a - b) <= 3 for a, b in zip(shown, expected, strict=True))
    found(browser, "[value=scores]").click()
    heat = until(browser, lambda: (now := browser.execute_script(PATCHES)) != plain and now)
    best = max(range(144), key=sent["scores"].__getitem__)
    assert sum(heat[best]) > sum(heat[min(range(144), key=sent["scores"].__getitem__)])
    found(browser, "#question").send_keys("What colour is the word?")
    found(browser, "#ask").click()
    until(browser, lambda: [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".assistant")] == ["sun", "red"])
    width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith((server.url, "data:", "blob:")) for name in loaded)
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_says_errors_as_sentences(server, browser, tmp_path):
    browser.get(server.url)
    found(browser, "#ask").click()
    assert found(browser, "#error").text == "Ask something first."
    broken = tmp_path / "broken.png"
    broken.write_bytes(WORD.read_bytes()[:200])
    found(browser, "#file").send_keys(str(broken))
    until(browser, lambda: found(browser, "#error").text == "")
    found(browser, "#question").send_keys(QUESTION)
    found(browser, "#ask").click()
    said = (
        "messages[0].content[0].image_url.url: the picture is damaged, truncated or unreadable; give an intact picture"
    )
    until(browser, lambda: found(browser, "#error").text == said)
    assert found(browser, "#ask").is_enabled()
    browser.execute_script("window.fetch = () => Promise.reject(new TypeError('no network'))")
    found(browser, "#ask").click()
    until(browser, lambda: "connection to the server broke" in found(browser, "#error").text)


def test_the_overlay_is_what_the_model_saw(server):
    reply = server.post({"messages": [asking(WORD)], "vlmtrim": {"show_kept": True}, "stream": True})
    last = reply.events[-2]
    (sent,) = last["vlmtrim"]["pictures"]
    assert last["choices"][0]["finish_reason"] == "stop"
    seen = Image.open(io.BytesIO(base64.b64decode(sent["image"].partition(",")[2])))
    assert seen.size[0] == seen.size[1] and seen.format == "JPEG"
    assert "vlmtrim" not in server.post({"messages": [asking(WORD)]}).json
    words = server.post({"messages": [{"role": "user", "content": "a"}], "vlmtrim": {"show_kept": True}}).json
    assert words["vlmtrim"] == {"pictures": []} and data_url(WORD.read_bytes()).startswith("data:")
