"""A page in the browser for a multi-layer SAE whose model stays loaded: it maps requests to `prompts`, `steering` and `top_examples`.

The threat is what other pages may make a browser do: no header lets another origin read an answer, POST takes only a type of content that
another origin may not send unasked, and the Host header must be this server's, so that no foreign name can be pointed at it. Nothing is
kept of a prompt.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import re
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from nnato import __version__
from nnato.errors import ActivationError, DictionaryError, MomentsError, NnatoError, OutputError, PositionError, SiteError, TextError
from nnato.models import describe
from nnato.multilayer import MultiLayerSAE
from nnato.operators import AffineMap
from nnato.pages import render
from nnato.prompts import EXAMPLE, prompt_activity
from nnato.sites import ResidualSite
from nnato.steering import POSITIONS, RUNS, steer
from nnato.top_examples import Example

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

MOST_BODY = 64 << 10
"""Bytes of a request."""
MOST_TOKENS = 512
"""Tokens of a prompt; the model's context, if that is shorter."""
MOST_ROWS = 400
"""Latents of a heat map, the strongest ones."""
MOST_SHOWN = 50
"""Next tokens of an answer."""
MOST_FACTOR = 1e6
PATIENCE = 60
"""Seconds that a request waits for the model while it works for others; then it is refused."""
REQUIRED = object()
ROUTES = {
    "/": "GET",
    "/api/about": "GET",
    "/api/prompt": "POST",
    "/api/steer": "POST",
    "/api/latents/N": "GET",
}
"""Paths and the one method of each; N is a latent."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",
}
FIELDS = {TextError: "prompt", PositionError: "prompt", SiteError: "layer", DictionaryError: "latent"}
"""Which field of a request an error is about."""


@dataclass(frozen=True)
class Request:
    """What a browser asks.

    Attributes:
        method: GET, POST and so on.
        path: As sent, with its query.
        headers: As sent.
        body: Empty for all but POST.
    """

    method: str
    path: str
    headers: Message = field(repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Answer:
    """What it is told.

    Attributes:
        status: The status of HTTP.
        body: The answer.
        kind: Its type of content.
        allow: The method that would have been right.
    """

    status: int
    body: bytes = field(repr=False)
    kind: str = "application/json"
    allow: str = ""

    def packed(self) -> bytes:
        """All of it as it is sent."""
        headers = {"Content-Type": f"{self.kind}; charset=utf-8", "Content-Length": len(self.body), **HEADERS}
        if self.allow:
            headers["Allow"] = self.allow
        lines = [f"HTTP/1.0 {self.status} {HTTPStatus(self.status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


class _RefusedError(Exception):
    """A request that is not answered, with its status and the field that is wrong."""

    def __init__(self, status: int, message: str, name: str | None = None, allow: str = "") -> None:
        super().__init__(message)
        self.status, self.name, self.allow = status, name, allow


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: A name or an address.
        port: The port.
    """

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host.lower() == "localhost" or _is_address(self.host, "is_loopback")

    @property
    def url(self) -> str:
        """What to type in a browser."""
        name = socket.gethostname() if _is_address(self.host, "is_unspecified") else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}/"

    def admits(self, header: str) -> bool:
        """Whether a Host header is this server's: a name that is not could be anyone's, pointed here while the page is open."""
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::(\d{1,5}))?", header.lower())
        if match is None or int(match[2] or 80) != self.port:
            return False
        name = match[1].strip("[]")
        if _is_address(self.host, "is_unspecified"):  # all addresses of this machine; nobody can point an address elsewhere
            return _is_address(name, "packed") or name in ("localhost", socket.gethostname().lower())
        return name == self.host.lower() or (self.loopback and name in ("localhost", "127.0.0.1", "::1"))


def _is_address(text: str, what: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(getattr(ipaddress.ip_address(text), what))
    return False


class Explorer:
    """A multi-layer SAE and its model, which answer one request at a time.

    Args:
        model: The model.
        sae: The SAE.
        back: For an SAE behind a lens, the way back to the residual of each layer: of `fidelity.backward_maps`.
        examples: Examples by latent: of `top_examples.read_examples`.
        opening: The prompt that the page opens with.

    Attributes:
        opening: This prompt.
        page: The page, which holds nothing of the model.

    Raises:
        DictionaryError: The SAE is of another model.
        MomentsError: It has a lens, and a layer has no way back.
    """

    def __init__(
        self,
        model: TransformersModel,
        sae: MultiLayerSAE,
        *,
        back: Mapping[ResidualSite, AffineMap] | None = None,
        examples: Mapping[int, Sequence[Example]] | None = None,
        opening: str = EXAMPLE,
    ) -> None:
        self._info = describe(model)
        sae.check_fits(self._info)
        if sae.lens is not None and (missing := set(sae.sites) - {sae.lens.last} - set(back or {})):
            raise MomentsError(f"behind a lens, steering needs a way back to layer {min(missing)}: give backward_maps(…)")
        self._model, self._sae, self._back, self._examples = model, sae.beside(model), back, dict(examples or {})
        self._lock, self.opening = threading.Lock(), opening
        self.page = render("serve.html")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The model and its tokenizer, for one request at a time."""
        if not self._lock.acquire(timeout=PATIENCE):
            raise _RefusedError(503, "the model is busy with other requests: try again")
        try:
            yield
        finally:
            self._lock.release()

    def rest(self) -> None:
        """Wait until no request runs the model, or for a while."""
        with contextlib.suppress(_RefusedError), self._turn():
            pass

    def about(self) -> dict[str, Any]:
        """What there is to ask for."""
        return {
            "nnato": __version__,
            "model": self._info.name,
            "latents": self._sae.latents,
            "layers": [site.key for site in self._sae.sites],
            "lens": self._sae.lens is not None,
            "prompt": self.opening,
            "examples": sorted(self._examples),
            "positions": list(POSITIONS),
            "runs": list(RUNS),
            "most": {"body": MOST_BODY, "tokens": MOST_TOKENS, "rows": MOST_ROWS, "shown": MOST_SHOWN},
        }

    def prompt(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Activations of a prompt, and the heat map of all of it or of one position."""
        text, position = _text(fields["prompt"]), fields["position"]
        with self._turn():
            tokens = self._check_length(text)
            if position is not None:
                position = _whole(position, "position", 0, tokens - 1)
            found = prompt_activity(self._model, self._sae, text, self._info)
        rows, active = found.rows(MOST_ROWS, position)
        named = [
            {"latent": latent, "total": round(total, 4), "shares": [round(one, 4) for one in shares]} for latent, shares, total in rows
        ]
        return {**found.to_json(), "heat_map": {"position": position, "active": active, "rows": named}}

    def steer(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The next token of a prompt with and without a latent added at a layer."""
        text, factor, positions = _text(fields["prompt"]), fields["factor"], fields["positions"]
        latent = _whole(fields["latent"], "latent", 0, self._sae.latents - 1)
        count = _whole(fields["count"], "count", 1, MOST_SHOWN)
        layers = {site.key: site for site in self._sae.sites}
        if type(fields["layer"]) not in (int, str) or fields["layer"] not in layers:
            raise _RefusedError(400, f"layer: give one of {json.dumps(list(layers))}", "layer")
        if type(factor) not in (int, float) or not abs(factor) <= MOST_FACTOR:
            raise _RefusedError(400, f"factor: give a number between {-MOST_FACTOR:.0f} and {MOST_FACTOR:.0f}", "factor")
        if not isinstance(positions, str) or positions not in POSITIONS:
            raise _RefusedError(400, f"positions: give {' or '.join(POSITIONS)}", "positions")
        site = layers[fields["layer"]]
        with self._turn():
            self._check_length(text)
            how: dict[str, Any] = {"factor": float(factor), "positions": positions, "back": self._back, "info": self._info}
            found = steer(self._model, self._sae, text, latent, site, **how)
            record = found.to_json(self._model.tokenizer, count)
        if not all(map(math.isfinite, record["kl"].values())):
            raise _RefusedError(400, "factor: the logits are not finite; give a smaller one, or serve with --dtype float32", "factor")
        return record

    def latent(self, number: int) -> dict[str, Any]:
        """Where a latent is most active in the text of the examples, if there are some."""
        if number >= self._sae.latents:
            raise _RefusedError(404, f"latents run from 0 to {self._sae.latents - 1}", "latent")
        known = self._examples.get(number)
        return {
            "latent": number,
            "link": self._sae.dictionary.link(number),
            "examples": None if known is None else [one.to_json() for one in known],
            "remedy": f"nnato mlsae examples SAE --latents {number} --out SAE" if known is None else None,
        }

    def _check_length(self, text: str) -> int:
        tokens = len(self._model.tokenizer(text).input_ids)
        if tokens > MOST_TOKENS:
            raise _RefusedError(400, f"prompt: it has {tokens} tokens; give at most {MOST_TOKENS}", "prompt")
        return tokens


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _RefusedError(400, "prompt: give some words", "prompt")
    if re.search("[\ud800-\udfff]", value):
        raise _RefusedError(400, "prompt: it holds half a character (a lone surrogate); give whole ones", "prompt")
    return value


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _RefusedError(400, f"{name}: give a whole number from {low} to {high}", name)
    return value


def _fields(body: bytes, **defaults: Any) -> dict[str, Any]:
    """The fields of a request: those without a default have to be there, and no others may be."""
    try:
        record = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise _RefusedError(400, f"the body is no JSON: send an object with {', '.join(defaults)}") from None
    if not isinstance(record, dict):
        raise _RefusedError(400, f"the body is no object: send one with {', '.join(defaults)}")
    for name in record:
        if name not in defaults:
            raise _RefusedError(400, f"{name[:40]!r} is no field here: give {', '.join(defaults)}", name[:40])
    for name, default in defaults.items():
        if default is REQUIRED and name not in record:
            raise _RefusedError(400, f"{name} is missing: give {', '.join(defaults)}", name)
    return {**defaults, **record}


# ---- from requests to answers --------------------------------------------------------------------------------------------------


def respond(explorer: Explorer, address: Address, request: Request) -> Answer:
    """Answer a request; what is wrong with it is said as JSON `{"error": {"field", "message"}}` with a status of its own.

    Args:
        explorer: What answers.
        address: Where it is asked.
        request: What is asked.
    """
    try:
        return _respond(explorer, address, request)
    except _RefusedError as refused:
        return _error(refused.status, str(refused), refused.name, refused.allow)
    except NnatoError as error:
        return _error(500 if isinstance(error, ActivationError) else 400, str(error), FIELDS.get(type(error)))


def _respond(explorer: Explorer, address: Address, request: Request) -> Answer:
    hosts = request.headers.get_all("Host", [])
    if len(hosts) != 1 or not address.admits(hosts[0]):
        raise _RefusedError(403, f"the Host header is not this server's: open {address.url}")
    if request.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
        raise _RefusedError(403, f"other pages may not ask: open {address.url}")
    path = request.path.partition("?")[0]
    latent = re.fullmatch(r"/api/latents/(\d{1,9})", path, re.ASCII)
    route = "/api/latents/N" if latent else path
    if route not in ROUTES or path == "/api/latents/N":
        raise _RefusedError(404, f"there is nothing here: {', '.join(ROUTES)} are all there is")
    if request.method != ROUTES[route]:
        raise _RefusedError(405, f"{route} takes {ROUTES[route]} only", allow=ROUTES[route])
    if route == "/":
        return Answer(200, explorer.page.encode(), "text/html")
    if latent is not None:
        return _json(200, explorer.latent(int(latent[1])))
    if route == "/api/about":
        return _json(200, explorer.about())
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise _RefusedError(415, "send Content-Type: application/json")
    if route == "/api/prompt":
        return _json(200, explorer.prompt(_fields(request.body, prompt=REQUIRED, position=None)))
    required = dict.fromkeys(("prompt", "latent", "layer", "factor"), REQUIRED)
    return _json(200, explorer.steer(_fields(request.body, **required, positions="last", count=10)))


def _json(status: int, record: Any, allow: str = "") -> Answer:
    return Answer(status, json.dumps(record, allow_nan=False, separators=(",", ":")).encode(), allow=allow)


def _error(status: int, message: str, name: str | None = None, allow: str = "") -> Answer:
    return _json(status, {"error": {"field": name, "message": message}}, allow)


def rehearse(explorer: Explorer) -> list[tuple[str, Answer]]:
    """Ask every route once, without a server: the opening prompt, its strongest latent, and what that does at the first layer.

    Args:
        explorer: What answers.

    Returns:
        Method with path, and the answer.
    """
    asked: list[tuple[str, Answer]] = []

    def ask(method: str, path: str, record: Any = None) -> dict[str, Any]:
        address, headers = Address("127.0.0.1", 8000), Message()
        headers["Host"], headers["Content-Type"] = "127.0.0.1:8000", "application/json"
        body = b"" if record is None else json.dumps(record).encode()
        answer = respond(explorer, address, Request(method, path, headers, body))
        asked.append((f"{method} {path}", answer))
        return json.loads(answer.body) if answer.status == 200 and answer.kind == "application/json" else {}

    ask("GET", "/")
    about = ask("GET", "/api/about")
    rows = ask("POST", "/api/prompt", {"prompt": explorer.opening}).get("heat_map", {}).get("rows", [])
    latent = max(rows, key=lambda row: row["total"])["latent"] if rows else 0
    ask("GET", f"/api/latents/{latent}")
    ask("POST", "/api/steer", {"prompt": explorer.opening, "latent": latent, "layer": about["layers"][0], "factor": 10})
    return asked


class PageServer(ThreadingHTTPServer):
    """Takes its port at once, and answers once `answer` is called.

    Args:
        host: A name or an address of this machine.
        port: The port; 0 for any free one.

    Attributes:
        address: Where it listens.

    Raises:
        OutputError: It cannot listen there.
    """

    daemon_threads = True
    explorer: Explorer

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise OutputError(f"{host} port {port}: {error.strerror or error}; choose another --port or --host") from None
        self.address = Address(host, self.server_address[1])

    def server_bind(self) -> None:
        """Take the port, without asking a name server what this machine is called, as the standard library would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def answer(self, explorer: Explorer) -> None:
        """Answer requests until an exception such as KeyboardInterrupt, or `shutdown` in another thread.

        Args:
            explorer: What answers.
        """
        self.explorer = explorer
        try:
            self.server_activate()
            self.serve_forever()
        finally:
            self.server_close()
            explorer.rest()  # a process that ends while torch computes may crash

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say of an error that nobody expected what class it is of, here; and to the browser only that there was one."""
        error = sys.exception()
        if isinstance(error, ConnectionError | TimeoutError):  # the browser has gone
            return
        sys.stderr.write(f"nnato mlsae serve: {type(error).__name__}: {error}\n")
        with contextlib.suppress(OSError):
            request.sendall(_error(500, "the server failed; its terminal says how").packed())


class _Handler(BaseHTTPRequestHandler):
    """Reads a request off its connection, within limits."""

    server: PageServer
    timeout = 30  # seconds of silence

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "" if self.command == "POST" else "0")
        if not re.fullmatch(r"\d{1,18}", length, re.ASCII) or "Transfer-Encoding" in self.headers:
            self._send(_error(411, "send Content-Length"))
        elif int(length) > MOST_BODY:
            self._send(_error(413, f"the request has {length} bytes; send at most {MOST_BODY}"))
            self.rfile.read(min(int(length), 16 * MOST_BODY))  # else the browser may see a broken connection and no answer
        else:
            request = Request(self.command, self.path, self.headers, self.rfile.read(int(length)))
            self._send(respond(self.server.explorer, self.server.address, request))

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer

    def _send(self, answer: Answer) -> None:
        packed = answer.packed()
        self.wfile.write(packed if self.command != "HEAD" else packed.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request of HTTP."""
        self._send(_error(int(code), message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is said of requests: prompts are the reader's own."""
