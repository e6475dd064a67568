"""Jobs on a server that misbehaves: a small HTTP server on loopback plays every fault that a real one cannot be made to show."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import zstandard

from nnato import remote
from nnato.errors import RemoteError
from nnato.models import load_model
from nnato.nnsight_setup import CONFIG, get_local_env, save
from nnato.remote import PUBLIC_HOST, NdifServer, explain, run_job
from nnato.trace import ATOTrace

TRACE = "Traceback (most recent call last):\n  File 'server.py', line 1\nnnato.errors.PositionError: position 99 lies outside"


class Fake(ThreadingHTTPServer):
    """Answers by a script: for each path a list of (status code, body), the last of which is repeated."""

    daemon_threads = True

    def __init__(self):
        self.script, self.seen = {}, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def tell(self, path, *answers):
        self.script[path] = list(answers)

    def status(self, status, description="", data=None, **rest):
        return 200, {"id": "job-1", "status": status, "description": description, "data": data, **rest}


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.server.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
        answers = self.server.script.get(self.path, [(404, {"detail": "no such path"})])
        code, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if code == 0:  # hang up
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def fake():
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.tell("/request", server.status("RECEIVED"))
    server.tell("/response/job-1", server.status("RUNNING"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def weightless(saved_model):
    return load_model(str(saved_model), remote=True)


def packed(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def run(model, server):
    def send(backend):
        with model.session(backend=backend):
            x = save(torch.ones(2))  # noqa: F841

    return run_job(server, model, send)


def test_a_job_is_sent_followed_and_fetched(fake, weightless, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "APIKEY", "planted-key")
    said = []
    fake.tell(
        "/response/job-1", (404, {}), fake.status("QUEUED"), fake.status("RUNNING"), fake.status("COMPLETED", data=f"{fake.url}/result")
    )
    fake.tell("/result", (200, packed({"x": torch.arange(3)})))
    server = NdifServer(fake.url, say=said.append)
    assert run(weightless, server)["x"].tolist() == [0, 1, 2]
    assert [text.split(": ", 1)[1].split(",")[0] for text in said] == ["sent", "received", "queued", "running"]
    assert server.sent > 100
    assert server.received > 100
    method, path, headers, body = fake.seen[0]
    assert (method, path, headers["ndif-api-key"]) == ("POST", "/request", "planted-key")
    assert b"planted-key" not in body
    assert "planted-key" not in "".join(said)


def test_a_job_can_be_attached_to(fake, weightless):
    fake.tell("/response/job-1", fake.status("COMPLETED", data=f"{fake.url}/result"))
    fake.tell("/result", (200, packed({"x": torch.ones(1)})))
    said = []
    server = NdifServer(fake.url, resume="job-1", say=said.append)
    assert run(weightless, server)["x"].tolist() == [1]
    assert not any(path == "/request" for _, path, _, _ in fake.seen)
    assert said == ["job job-1: attached"]
    assert run(weightless, server)["x"].tolist() == [1]  # the next one is sent again
    assert any(path == "/request" for _, path, _, _ in fake.seen)


def test_a_lost_connection_loses_no_job(fake, weightless, monkeypatch):
    fake.tell("/response/job-1", (0, b""), fake.status("RUNNING"), (0, b""), (0, b""), fake.status("COMPLETED", data=f"{fake.url}/result"))
    fake.tell("/result", (200, packed({"x": torch.ones(1)})))
    assert run(weightless, NdifServer(fake.url))["x"].tolist() == [1]
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    fake.tell("/response/job-1", (0, b""))
    with pytest.raises(RemoteError, match=r"job job-1: http://127.0.0.1:\d+ cannot be reached \(.*wait for it with --resume-job job-1"):
        run(weightless, NdifServer(fake.url))


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (401, {"detail": "Missing or invalid API key."}, r"the server refused the key: set NDIF_API_KEY .*Missing or invalid API key"),
        (403, {"detail": "Invalid API key."}, "the server refused the key: set NDIF_API_KEY"),
        (403, b"", "the server refused the request: set NDIF_API_KEY"),
        (
            400,
            {"detail": "Client nnsight version 0.8.1 is below the minimum supported 1."},
            "the server wants another client: upgrade nnsight",
        ),
        (503, {"detail": "Service temporarily unavailable: compute backend is reconnecting."}, "is not ready: try again in a few minutes"),
        (500, {"detail": "Internal server error."}, r"the server failed \(.*Internal server error"),
    ],
)
def test_requests_that_are_refused(fake, weightless, code, body, message):
    fake.tell("/request", (code, body))
    with pytest.raises(RemoteError, match=message):
        run(weightless, NdifServer(fake.url))
    assert len(fake.seen) == (3 if code == 503 else 1)  # what may pass is tried again, twice


@pytest.mark.parametrize(
    ("description", "message", "tries"),
    [
        ("Could not deploy this model. Not enough memory.", r"job job-1: the server cannot run this model: nnsight.status\(\) lists", 1),
        ("Your job exceeded the execution timeout of 3.0s.", "the job ran into the server's time limit: give a smaller --per-job", 1),
        ("Replica was evicted while processing your request.", "the server ended the job: try again", 3),
        ("Error submitting request to model deployment.", "the server ended the job: try again", 3),
        (TRACE, "job job-1: the block failed on the server: PositionError: position 99 lies outside", 1),
        ("Something else.", r"job job-1: the server failed \(Something else.\)", 1),
    ],
)
def test_jobs_that_fail(fake, weightless, description, message, tries):
    fake.tell("/response/job-1", fake.status("RUNNING"), fake.status("ERROR", description))
    with pytest.raises(RemoteError, match=message) as caught:
        run(weightless, NdifServer(fake.url))
    assert caught.value.job == "job-1"
    assert sum(path == "/request" for _, path, _, _ in fake.seen) == tries
    if description == TRACE:
        assert caught.value.__notes__ == [TRACE]


def test_a_job_that_hangs_is_left_after_the_time_given(fake, weightless):
    for answer, status in (((404, {}), "received"), (fake.status("RUNNING"), "running")):
        fake.tell("/response/job-1", answer)
        started = time.monotonic()
        with pytest.raises(
            RemoteError, match=rf"job job-1 is not done after 0 s \(last status: {status}\): wait for it with --resume-job job-1"
        ):
            run(weightless, NdifServer(fake.url, timeout=0.3))
        assert time.monotonic() - started < 20


def test_results_that_have_expired_or_are_none(fake, weightless):
    fake.tell("/response/job-1", fake.status("COMPLETED", data=f"{fake.url}/result"))
    fake.tell("/result", (403, b"expired"))
    with pytest.raises(RemoteError, match=r"job job-1: its result cannot be fetched \(HTTP 403\); results are kept for a limited time"):
        run(weightless, NdifServer(fake.url))
    for damaged in (b"", b"no zstd", zstandard.ZstdCompressor().compress(b"no torch file"), packed({"x": torch.ones(9)})[:-20]):
        fake.tell("/result", (200, damaged))
        with pytest.raises(RemoteError, match="the answer of job job-1 cannot be read"):
            run(weightless, NdifServer(fake.url))


class Canary:
    def __reduce__(self):
        return open, ("/canary/does/not/exist", "w")


def test_answers_run_no_code(fake, weightless):
    fake.tell("/response/job-1", fake.status("COMPLETED", data=f"{fake.url}/result"))
    fake.tell("/result", (200, packed({"x": Canary()})))
    with pytest.raises(RemoteError, match="the answer of job job-1 cannot be read .it is damaged, or holds more than data"):
        run(weightless, NdifServer(fake.url))


@pytest.mark.slow
@pytest.mark.parametrize("answer", [(401, {"detail": "Invalid API key."}), (500, b"oops"), None])
def test_the_key_is_never_shown_or_stored(fake, saved_model, text, tmp_path, answer):
    """Everything a command prints and writes, with all logging on, searched for a planted key."""
    if answer is not None:
        fake.tell("/request", answer)
    else:
        fake.tell("/response/job-1", fake.status("ERROR", description="Traceback (most recent call last):\nValueError: on purpose"))
    switch = "import logging, sys; logging.basicConfig(level=0); from nnato.cli import main; main()"
    command = [sys.executable, "-c", switch, "accumulate", str(saved_model), "--text", str(text), "--context", "32", "--pairs", "0:1"]
    command += ["--remote", "--host", fake.url, "--out", str(tmp_path / "out")]
    environment = {**os.environ, "NDIF_API_KEY": "planted-key", "NNATO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert any(headers.get("ndif-api-key") == "planted-key" for _, _, headers, _ in fake.seen)
    assert b"planted-key" not in done.stdout + done.stderr
    assert len(done.stderr) > 100
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"planted-key" in path.read_bytes()]


def test_answers_that_unpack_to_anything_are_refused(fake, weightless, monkeypatch):
    """Against bombs: 30 kB that unpack to 1 GB, and a frame of a few bytes that says it is 2^60 long."""
    fake.tell("/response/job-1", fake.status("COMPLETED", data=f"{fake.url}/result"))
    monkeypatch.setattr(remote, "LARGEST_ANSWER", 10**8)
    stream = zstandard.ZstdCompressor().compressobj(size=10**9)
    bomb = b"".join([*(stream.compress(bytes(10**6)) for _ in range(1000)), stream.flush()])
    long = b"\x28\xb5\x2f\xfd\xe0" + (2**60).to_bytes(8, "little") + b"\x01\x00\x00"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in (bomb, long):
        assert len(content) < 100_000
        fake.tell("/result", (200, content))
        with pytest.raises(RemoteError, match=r"the answer of job job-1 cannot be read \(it unpacks to .* are all that this machine takes"):
            run(weightless, NdifServer(fake.url))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("value", [[1, 2], torch.ones(3), "text", 5])
def test_answers_of_another_type_are_refused(fake, weightless, value):
    fake.tell("/response/job-1", fake.status("COMPLETED", data=f"{fake.url}/result"))
    fake.tell("/result", (200, packed(value)))
    with pytest.raises(RemoteError, match=f"the answer of job job-1 is a {type(value).__name__}, not what was saved"):
        run(weightless, NdifServer(fake.url, timeout=5))


@pytest.mark.parametrize("body", [{"id": 5, "status": "BOGUS"}, {"id": "job-1", "status": None}, [], b"\0" * 100, {"id": "job-1"}])
def test_statuses_that_are_none_are_refused(fake, weightless, body):
    fake.tell("/response/job-1", (200, body))
    with pytest.raises(RemoteError, match="job-1"):
        run(weightless, NdifServer(fake.url, timeout=3))


def test_hosts_that_are_none(weightless, monkeypatch):
    with pytest.raises(RemoteError, match="host 'api.ndif.us' is no URL: give one such as https"):
        NdifServer("api.ndif.us")
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(RemoteError, match=f"{PUBLIC_HOST} asks for a key, and there is none: set NDIF_API_KEY"):
        NdifServer()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for host in (f"http://127.0.0.1:{port}", "http://no.such.host.invalid"):
        with pytest.raises(RemoteError, match=rf"{host} cannot be reached \(.*check --host"):
            run(weightless, NdifServer(host))
        with pytest.raises(RemoteError, match=rf"{host} cannot be reached \(.*check --host"):
            NdifServer(host).check()


def test_plain_http_to_other_machines_is_warned_about():
    said = []
    NdifServer("http://192.0.2.1:8001", say=said.append)
    assert said == ["warning: http://192.0.2.1:8001 is not encrypted; texts and the key travel in the open"]
    for host in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://192.0.2.1"):
        NdifServer(host, say=said.append)
    assert len(said) == 1


def test_versions_are_compared(fake):
    mine = get_local_env()["packages"]
    same = {name: mine[name] for name in ("nnsight", "torch", "transformers")}
    fake.tell("/env", (200, {"python_version": "3.12", "packages": same}))
    assert NdifServer(fake.url).check() == ()
    fake.tell("/env", (200, {"python_version": "3.12", "packages": same | {"nnsight": "0.8.0"}}))
    said = []
    assert NdifServer(fake.url, say=said.append).check() == (f"nnsight {mine['nnsight']} here, 0.8.0 there",)
    assert f"versions differ from {fake.url}: nnsight {mine['nnsight']} here, 0.8.0 there" in said[0]
    fake.tell("/env", (404, {}))
    assert NdifServer(fake.url).check() == ()
    fake.tell("/env", (503, {"detail": "compute backend is reconnecting"}))
    with pytest.raises(RemoteError, match="the server is not ready"):
        NdifServer(fake.url).check()
    fake.tell("/env", (200, b"<html>a web page</html>"))
    with pytest.raises(RemoteError, match="does not answer as an NDIF server does"):
        NdifServer(fake.url).check()


def test_traces_raise_the_same_errors(fake, weightless):
    """With remote=, nnsight follows the job itself, over a websocket that this server does not have."""
    with pytest.raises(RemoteError, match="the server failed|cannot be reached"), ATOTrace(weightless, "w1 w2", remote=fake.url) as t:
        t.logits.save()
    with pytest.raises(RemoteError, match="cannot run remotely: Invalid host URL"):
        ATOTrace(weightless, "w1 w2", remote="nowhere")


def test_errors_of_an_unknown_kind_are_shown():
    assert str(explain(OSError(), "http://x")) == "the server failed (OSError)"
