"""``tracer serve``: its JSON and its page, asked by many at once. The oracle is the store's reader."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from browser import MOST_SECONDS, browser, console
from torch import nn

from tracer import Tracer, attribute
from tracer.scoring.top_queries import TopKQuery
from tracer.store import Store

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")


class Server:
    """The application in a thread, on a free port."""

    def __init__(self, path):
        from tracer.cli.serving import make_app

        app = make_app(Store.open_existing(path), torch.device("cpu"), ["127.0.0.1", "localhost"])
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def ask(self, path, method="GET", host=None, **query):
        """Return status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {} if host is None else {"Host": host}
        connection.request(method, f"{path}?{urlencode(query)}" if query else path, headers=headers)
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        return response.status, dict(response.getheaders()), body

    def json(self, path, method="GET", **query):
        status, _, body = self.ask(path, method, **query)
        return status, json.loads(body)

    def close(self):
        self._server.should_exit = True
        self._thread.join(20)


X, Y = torch.randn(23, 4, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 3
TARGET_Y = torch.arange(5) % 3
IDS = [f"images/{number}.png" for number in range(23)]
MODEL = nn.Linear(4, 3)
CHECKPOINT = {name: value.detach().clone() for name, value in MODEL.state_dict().items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "store"
    given = MODEL, "image_classification", (X, Y), (X[:5] + 0.1, TARGET_Y), [(CHECKPOINT, 0.1)]
    attribute(*given, save_dir=path, exp_name="test", proj_dim=64, ids=IDS)
    return path


@pytest.fixture(scope="module")
def server(store):
    found = Server(store)
    yield found
    found.close()


@pytest.fixture
def held(monkeypatch):
    """Computing waits before each part until the event is set."""
    free, compute = threading.Event(), TopKQuery.compute

    def slow(self, ranges):
        assert free.wait(60)
        return compute(self, ranges)

    monkeypatch.setattr(TopKQuery, "compute", slow)
    yield free
    free.set()


@pytest.mark.parametrize("estimator", ["tracin", "influence"])
@pytest.mark.parametrize("kind", ["proponents", "opponents"])
def test_answers_are_those_of_the_store(server, store, estimator, kind):
    status, found = server.json("/api/top", target=3, k=4, kind=kind, estimator=estimator, wait=60)
    top = Tracer.open(store).top("test", 4, kind, estimator)
    assert (status, found["state"]) == (200, "done")
    assert [row["index"] for row in found["rows"]] == top.indices[3].tolist()
    np.testing.assert_allclose([row["score"] for row in found["rows"]], top.scores[3])
    assert found["label"] == int(TARGET_Y[3])
    assert [row["id"] for row in found["rows"]] == [IDS[index] for index in top.indices[3]]
    assert [row["label"] for row in found["rows"]] == Y[top.indices[3]].tolist()


def test_self_influence_is_that_of_the_store(server, store):
    found = server.json("/api/self-influence", k=3, wait=60)[1]["rows"]
    values = Tracer.open(store).self_influence()
    assert [row["index"] for row in found] == np.argsort(-values)[:3].tolist()


def test_the_store_is_described(server):
    found = server.json("/api/store")[1]
    assert (found["train_set_size"], found["targets"]) == (23, {"test": 5})


def test_fifty_ask_at_once(server, store):
    questions = [(target, estimator) for target in range(5) for estimator in ("tracin", "cosine", "influence")] * 4
    with ThreadPoolExecutor(50) as pool:
        asked = list(
            pool.map(lambda each: server.json("/api/top", target=each[0], estimator=each[1], wait=60), questions)
        )
    reader = Tracer.open(store)
    expected = {estimator: reader.top("test", 10, estimator=estimator).indices for _, estimator in questions}
    for (target, estimator), (status, found) in zip(questions, asked, strict=True):
        assert status == 200
        assert [row["index"] for row in found["rows"]] == expected[estimator][target].tolist()
    assert len({found["job"] for _, found in asked}) == 3  # the same question is computed once


def test_a_question_shows_its_progress_and_others_are_answered_meanwhile(server, held):
    status, found = server.json("/api/top", k=7, wait=0)
    assert (status, found["state"]) == (202, "running")
    assert server.json(f"/api/jobs/{found['job']}")[1]["state"] == "running"
    assert server.json("/api/store")[0] == 200
    held.set()
    status, again = server.json("/api/top", k=7, wait=60)
    assert (status, again["job"], again["done"], again["total"]) == (200, found["job"], 23, 23)


def test_a_question_can_be_cancelled_and_asked_again(server, held):
    job = server.json("/api/top", k=8, wait=0)[1]["job"]
    time.sleep(0.2)  # it runs
    assert server.json(f"/api/jobs/{job}", "DELETE")[1]["state"] == "cancelling"
    waiting = server.json("/api/top", k=3, wait=0)[1]["job"]
    server.json(f"/api/jobs/{waiting}", "DELETE")
    held.set()
    states = set()
    for _ in range(100):
        states = {server.json(f"/api/jobs/{each}")[1]["state"] for each in (job, waiting)}
        if not states & {"cancelling", "running"}:
            break
        time.sleep(0.05)
    assert server.json(f"/api/jobs/{waiting}")[1]["state"] == "cancelled"
    status, found = server.json("/api/top", k=3, wait=60)
    assert (status, found["job"] == waiting, len(found["rows"])) == (200, False, 3)


def test_changed_learning_rates_are_not_answered_from_memory(server, store):
    before = server.json("/api/self-influence", wait=60)[1]["rows"][0]["score"]
    with Tracer(MODEL, "image_classification", 23, store, 64) as tracing:
        tracing.load_checkpoint(CHECKPOINT, 0, learning_rate=0.5)
        assert server.json("/api/self-influence", wait=60)[1]["rows"][0]["score"] == pytest.approx(5 * before)
        tracing.load_checkpoint(CHECKPOINT, 0, learning_rate=0.1)


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ({"target": 5}, 400, "has targets 0 to 4"),
        ({"exp_name": "../../etc"}, 400, "is not known"),
        ({"estimator": "tracn"}, 400, "did you mean 'tracin'"),
        ({"kind": "all"}, 400, "is not known"),
        ({"k": 0}, 422, "greater than or equal to 1"),
        ({"target": "x"}, 422, "valid integer"),
    ],
)
def test_bad_questions_are_refused(server, query, status, says):
    got, found = server.json("/api/top", **query)
    assert got == status
    assert says in json.dumps(found)


def test_nothing_but_the_store_is_served(server):
    for path in (
        "/../../etc/passwd",
        "/store/zarr.json",
        "/zarr.json",
        "/api/jobs/..%2f..",
        "/docs",
        "/redoc",
        "/static/x",
    ):
        assert server.ask(path)[0] == 404
    assert server.ask("/api/store", host="evil.example")[0] == 400  # a name that somebody points at this machine
    assert server.ask("/api/top", "POST")[0] == 405
    headers = server.ask("/")[1]
    assert "default-src 'none'" in headers["content-security-policy"]


def test_the_command_listens_on_this_machine_only_and_refuses_a_used_port(store):
    command = [sys.executable, "-m", "tracer", "serve", str(store), "--port"]
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert "at http://127.0.0.1:" in line
        port = line.split("127.0.0.1:")[1].split("/")[0]
        second = subprocess.run([*command, port], capture_output=True, text=True, check=False)
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        connection.request("GET", "/api/store")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(2)
        process.wait(30)
    assert second.returncode == 2
    assert "in use" in second.stderr


def wait_for(chrome, script):
    deadline = time.monotonic() + MOST_SECONDS
    while not (found := chrome.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return found


def test_the_page_asks_shows_progress_and_cancels(server, store, held):
    with browser() as chrome:
        for width, scheme in ((1400, "light"), (390, "dark")):
            feature = [{"name": "prefers-color-scheme", "value": scheme}]
            chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            chrome.get(f"http://127.0.0.1:{server.port}/")
            wait_for(chrome, "document.documentElement.dataset.ready === 'yes'")
            assert chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        chrome.execute_script("document.querySelector('#targets [name=target]').value = 2")
        chrome.execute_script("document.querySelector('#targets [name=k]').value = 9")
        chrome.execute_script("document.querySelector('#targets form').requestSubmit()")
        wait_for(chrome, "document.querySelector('#targets .waiting span').textContent.includes('of 23')")
        chrome.execute_script("document.querySelector('#targets .waiting button').click()")
        wait_for(chrome, "document.querySelector('#targets .status').textContent.startsWith('Cancelled')")
        held.set()
        while server.json("/api/top", k=9, wait=60)[0] != 200:  # until the cancelled one has ended
            time.sleep(0.05)
        chrome.execute_script("document.querySelector('#targets form').requestSubmit()")
        wait_for(chrome, "document.querySelector('#targets tbody')")
        cells = chrome.execute_script(
            "return [...document.querySelectorAll('#targets tbody td:nth-child(2)')].map(each => each.textContent)"
        )
        assert cells == [IDS[index] for index in Tracer.open(store).top("test", 9, estimator="cosine").indices[2]]
        assert [each for each in console(chrome) if "409" not in each] == []
