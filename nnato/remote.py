"""Jobs on an NDIF server: send a block, wait for its answer, and say in one kind of error what went wrong."""

from __future__ import annotations

import io
import ipaddress
import os
import time
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import torch
import websocket
import zstandard

from nnato.errors import ModelError, RemoteError, first_line
from nnato.nnsight_setup import CONFIG, NnsightRemoteError, RemoteBackend, TransformersModel, get_local_env

PUBLIC_HOST = "https://api.ndif.us"
LONGEST_PAUSE = 2.0
"""Seconds between two questions about a job that takes long."""
CRITICAL = ("nnsight", "torch", "transformers")
PATIENCE = 60.0
"""Seconds for which a server may be out of reach while a job of ours is there."""
ERRORS = (NnsightRemoteError, httpx.HTTPError, websocket.WebSocketException, ConnectionError, TimeoutError, OSError)
"""What nnsight and its transports raise when a job cannot be sent, followed or fetched."""
LARGEST_ANSWER = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
"""Bytes of an unpacked answer at most: half of this machine's memory."""
UNPICKLING = torch.serialization.pickle.UnpicklingError  # type: ignore[attr-defined]
UNREADABLE = (UNPICKLING, zstandard.ZstdError, RuntimeError, ValueError, EOFError, KeyError)
"""What reading an answer raises that is none, or holds more than data."""


class Server(Protocol):
    """Where blocks can be sent: `NdifServer`, or `dry_run.DryRunServer`."""

    host: str
    retries: int
    say: Callable[[str], None]
    sent: int
    received: int

    def backend(self, model: TransformersModel) -> Any:
        """An nnsight backend for one block, with a method `wait` that gives what the block saved."""


class NdifServer:
    """A server that runs blocks of code on a model it hosts: NDIF's public one, or any other.

    Jobs are submitted and then asked about, so a lost connection loses nothing, and one that the server still knows can be attached to.
    The key is read by nnsight, from `NDIF_API_KEY` or its own configuration; nnato stores none.

    Args:
        host: URL, with scheme; by default nnsight's configuration (`NDIF_HOST`, else the public server).
        timeout: Seconds that a job may take, waiting included.
        retries: How often a job is sent again after a failure that says nothing about it (the server restarts, a worker was lost).
        resume: Id of a job, sent earlier by the same call, to wait for instead of sending the first one again.
        say: Told of each job's id and status, in words.

    Attributes:
        sent: Bytes of the last request.
        received: Bytes of the last answer.

    Raises:
        RemoteError: The host is no URL, or the public server is meant and there is no key.
    """

    def __init__(
        self,
        host: str | None = None,
        *,
        timeout: float = 3600.0,
        retries: int = 2,
        resume: str | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.host = (host or CONFIG.API.HOST).rstrip("/")
        self.timeout, self.retries, self.resume, self.say = timeout, retries, resume, say
        self.sent = self.received = 0
        parts = urlsplit(self.host)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RemoteError(f"host {self.host!r} is no URL: give one such as https://api.ndif.us or http://127.0.0.1:8001")
        if self.host == PUBLIC_HOST and not CONFIG.API.APIKEY:
            raise RemoteError(f"{self.host} asks for a key, and there is none: set NDIF_API_KEY, or run `nnsight login`")
        if parts.scheme == "http" and not _loopback(parts.hostname):
            self.say(f"warning: {self.host} is not encrypted; texts and the key travel in the open")

    def check(self) -> tuple[str, ...]:
        """Ask whether the server is there, and compare versions with it.

        Returns:
            The packages that differ, with both versions; said as well.

        Raises:
            RemoteError: It cannot be reached, or is not ready.
        """
        try:
            response = httpx.get(f"{self.host}/env", timeout=httpx.Timeout(10.0, read=60.0))
            response.raise_for_status()
            theirs = response.json()
            packages = {name: _public(theirs["packages"].get(name)) for name in CRITICAL}
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 404:
                return ()  # an older server, which does not tell
            raise explain(error, self.host) from None
        except ERRORS as error:
            raise explain(error, self.host) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RemoteError(f"{self.host} does not answer as an NDIF server does: check the host") from None
        mine = get_local_env()["packages"]
        pairs = [(name, _public(mine.get(name)), version) for name, version in packages.items()]
        other = tuple(f"{name} {here} here, {there} there" for name, here, there in pairs if here != there)
        if other:
            self.say(f"warning: versions differ from {self.host}: {'; '.join(other)}; results may differ in their last digits")
        return other

    def backend(self, model: TransformersModel) -> Job:
        """What runs one block of a trace or session of `model` as a job: an nnsight backend.

        Raises:
            ModelError: The model has no name that a server could know.
        """
        try:
            key = model.to_model_key()
        except (ValueError, OSError, httpx.HTTPError) as error:
            raise ModelError(
                f"this model has no name that a server could know ({first_line(error)}): load it with load_model(…, remote=True)"
            ) from None
        job, self.resume = self.resume, None
        return Job(self, key, model._remoteable_get_env(), job)


class Job(RemoteBackend):  # type: ignore[misc]
    """One block on its way: an nnsight backend that sends when the block is run, and waits when asked to."""

    def __init__(self, server: NdifServer, model_key: str, env: dict[str, Any], job_id: str | None) -> None:
        super().__init__(model_key, host=server.host, env=env, blocking=False, job_id=job_id)
        self.server = server
        self.display.enabled = False
        self.deadline = time.monotonic() + server.timeout

    def __call__(self, tracer: Any = None) -> None:
        """Send the block, unless it was sent before."""
        if self.job_id is not None:
            self.server.say(f"job {self.job_id}: attached")
            return
        try:
            self.submit(tracer)
        except ERRORS as error:
            raise explain(error, self.host) from None
        self.server.say(f"job {self.job_id}: sent, {in_words(self.server.sent)}")

    def _serialize(self, tracer: Any) -> bytes:
        blob: bytes = super()._serialize(tracer)
        self.server.sent = len(blob)
        return blob

    def finalize(self, content: bytes) -> Any:
        """Read an answer: tensors, numbers, text, and lists and dicts of them. Runs no code, unlike nnsight's own."""
        self.server.received = len(content)
        if self.compress:
            unpacked = zstandard.frame_content_size(content)
            if unpacked > LARGEST_ANSWER:  # a few bytes can say that they are any number
                raise ValueError(f"it unpacks to {in_words(unpacked)}, and {in_words(LARGEST_ANSWER)} are all that this machine takes")
            content = zstandard.ZstdDecompressor().decompress(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def wait(self) -> dict[str, Any]:
        """Ask about the job until it is done.

        Returns:
            What the block saved, by name.

        Raises:
            RemoteError: The job failed, took too long, or its answer cannot be had.
        """
        pause, told, lost = 0.05, None, None
        while True:
            try:
                result = self.poll()
                lost = None
            except (httpx.TransportError, ConnectionError) as error:  # a job outlives a lost connection
                now = time.monotonic()
                lost = lost or now
                if now - lost > PATIENCE:
                    raise explain(error, self.host, self.job_id) from None
                result = None
            except ERRORS as error:
                raise explain(error, self.host, self.job_id) from None
            except UNREADABLE as error:
                why = "it is damaged, or holds more than data" if isinstance(error, UNPICKLING) else first_line(error)
                raise RemoteError(f"the answer of job {self.job_id} cannot be read ({why}): send it again", job=self.job_id) from None
            if isinstance(result, dict):
                return result
            if result is not None:
                raise RemoteError(f"the answer of job {self.job_id} is a {type(result).__name__}, not what was saved", job=self.job_id)
            status = "" if self.status is None else self.status.value.lower()
            if status != told:
                self.server.say(f"job {self.job_id}: {status or 'no status yet'}")
                told = status
            if time.monotonic() > self.deadline:
                raise RemoteError(
                    f"job {self.job_id} is not done after {self.server.timeout:.0f} s (last status: {told or 'none'}): "
                    f"wait for it with --resume-job {self.job_id}, or give more --timeout",
                    job=self.job_id,
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


class _Explained:
    """An nnsight backend whose errors say what to do."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __call__(self, tracer: Any = None) -> Any:
        try:
            return self.backend(tracer)
        except ERRORS as error:
            raise explain(error, getattr(self.backend, "host", "the server"), getattr(self.backend, "job_id", None)) from None

    def __getattr__(self, name: str) -> Any:
        if name == "backend":
            raise AttributeError(name)
        return getattr(self.backend, name)


def live_backend(model: TransformersModel, remote: bool | str) -> Any:
    """The backend nnsight chooses for `remote=` of a trace, which follows its job over one connection.

    Raises:
        RemoteError: The host is no URL.
        ModelError: The model has no name that a server could know.
    """
    try:
        return _Explained(model._remote_backend(remote, True, None, False))
    except ValueError as error:
        raise RemoteError(f"cannot run remotely: {first_line(error)}") from None


def run_job(server: Server, model: TransformersModel, send: Callable[[Any], None]) -> dict[str, Any]:
    """Send one block, wait for what it saved, and send it again after a failure that says nothing about it.

    Args:
        server: Where.
        model: The model.
        send: Runs the block under the nnsight backend it is given.

    Returns:
        What the block saved, by name.

    Raises:
        RemoteError: The job failed for good.
    """
    attempt = 0
    while True:
        try:
            backend = server.backend(model)
            send(backend)
            answer: dict[str, Any] = backend.wait()
            return answer
        except RemoteError as error:
            attempt += 1
            if not error.transient or attempt > server.retries:
                raise
            server.say(f"{error}; sending it again ({attempt} of {server.retries})")


def labelled(answer: Any, label: str) -> dict[str, Any]:
    """What a job saved under a name, when it carries the label that was sent along.

    Raises:
        RemoteError: It is another job's.
    """
    if not isinstance(answer, dict) or answer.get("label") != label:
        raise RemoteError("the answer is not of this job: with --resume-job, repeat exactly the call that sent it")
    return answer


_CAUSES = (
    # (words in the text, what to say and do, whether another try may succeed)
    (("api key",), "the server refused the key: set NDIF_API_KEY to a valid one, or run `nnsight login`", False),
    (("401 unauthorized", "403 forbidden"), "the server refused the request: set NDIF_API_KEY to a valid key", False),
    (("below the minimum supported", "nnsight version"), "the server wants another client: upgrade nnsight", False),
    (("could not deploy", "not deployed"), "the server cannot run this model: nnsight.status() lists those that it runs", False),
    (("execution timeout",), "the job ran into the server's time limit: give a smaller --per-job", False),
    (("unavailable", "reconnecting", "503 service", "502 bad", "504 gateway"), "the server is not ready: try again in a few minutes", True),
    (("evicted", "submitting request to model deployment", "cancelled"), "the server ended the job: try again", True),
)


def explain(error: BaseException, host: str, job: str | None = None) -> RemoteError:
    """What went wrong, the job if there is one, and what to do, from any error of nnsight or of its transports."""
    text = str(error).strip()
    name = f"job {job}: " if job else ""
    unreachable = isinstance(error, httpx.TransportError | ConnectionError) or "[Errno" in text or "Name or service" in text
    if "Traceback (most recent call last)" in text:
        last = text.splitlines()[-1].strip().removeprefix("nnato.errors.")
        explained = RemoteError(f"{name}the block failed on the server: {last}", job=job)
        explained.add_note(text)
        return explained
    if unreachable:
        remedy = f"wait for it with --resume-job {job}" if job else "check --host (or NDIF_HOST) and the network"
        return RemoteError(f"{name}{host} cannot be reached ({first_line(error)}): {remedy}", job=job)
    if isinstance(error, httpx.HTTPStatusError) and job:
        return RemoteError(
            f"{name}its result cannot be fetched (HTTP {error.response.status_code}); results are kept for a limited time: send it again",
            job=job,
        )
    for words, remedy, transient in _CAUSES:
        if any(word in text.lower() for word in words):
            return RemoteError(f"{name}{remedy} ({first_line(error)})", job=job, transient=transient)
    return RemoteError(f"{name}the server failed ({first_line(error)})", job=job)


def _public(version: object) -> str:
    """A version without what a build adds to it (2.13.0+cpu)."""
    return str(version).partition("+")[0]


def in_words(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
