"""`nnato mlsae serve`: what is answered, what is refused, a real server, the command, and the page in a browser."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from email.message import Message
from html import unescape

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import BLOCKS, hook_residuals
from test_multilayer import LATENTS, authors_checkpoint, random_lens, random_sae
from test_prompts import PROMPT, dense_codes

from nnato.cli import main
from nnato.dictionaries import Dictionary
from nnato.errors import FileFormatError, MomentsError, OutputError
from nnato.models import load_model
from nnato.multilayer import MultiLayerSAE
from nnato.operators import AffineMap
from nnato.prompts import EXAMPLE
from nnato.serving import HEADERS, MOST_BODY, ROUTES, Address, Explorer, PageServer, Request, rehearse, respond
from nnato.sites import ResidualSite
from nnato.top_examples import FILE, Example, read_examples

HERE = Address("127.0.0.1", 8000)
STEER = {"prompt": PROMPT, "latent": 3, "layer": 0, "factor": 2}


def ask(explorer, method, path, record=None, *, body=None, address=HERE, **headers):
    """The answer and what it says, for a request with the headers that a browser sends from the page."""
    message = Message()
    for name, value in {"Host": "127.0.0.1:8000", "Content-Type": "application/json", **headers}.items():
        if value is not None:
            message[name.replace("_", "-")] = value
    sent = json.dumps(record).encode() if body is None else body
    answer = respond(explorer, address, Request(method, path, message, sent))
    return answer.status, json.loads(answer.body) if answer.kind == "application/json" else answer.body.decode()


@pytest.fixture
def explorer(model):
    example = Example(3, ResidualSite(2), 1.5, ("w1", "<script>alert(1)</script>"), 1, 7)
    return Explorer(model, random_sae(), examples={3: [example], 5: []})


# ---- what is answered ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [None, 3])
def test_a_prompt_has_the_activations_of_hooks(explorer, model, position):
    status, found = ask(explorer, "POST", "/api/prompt", {"prompt": PROMPT, "position": position})
    assert status == 200
    dense = dense_codes(model, random_sae(), torch.tensor([model.tokenizer(PROMPT).input_ids]))[0][:, 0]
    dense[:, ~np.array(found["encoded"])] = 0
    for cell in found["active"]:
        assert dict(cell["latents"]) == pytest.approx(
            {latent: dense[cell["site"], cell["position"], latent] for latent, _ in cell["latents"]}, abs=1e-3
        )
    assert sum(len(cell["latents"]) for cell in found["active"]) == np.count_nonzero(dense)
    totals = (dense if position is None else dense[:, [position]]).sum(1)
    rows = found["heat_map"]["rows"]
    assert {row["latent"] for row in rows} == set(np.flatnonzero(totals.sum(0)))
    assert found["heat_map"]["active"] == len(rows)
    for row in rows:
        mine = totals[:, row["latent"]]
        assert row["total"] == pytest.approx(mine.sum(), abs=1e-3)
        assert row["shares"] == pytest.approx(mine / mine.sum(), abs=1e-3)


@pytest.mark.parametrize("layer", [0, BLOCKS - 1])
def test_steering_has_the_logits_of_hooks_at_that_layer(explorer, model, layer):
    status, found = ask(explorer, "POST", "/api/steer", {**STEER, "layer": layer, "factor": -4.5, "positions": "all", "count": 4})
    assert status == 200
    assert (found["site"], found["latent"], found["factor"], found["positions"]) == (layer, 3, -4.5, "all")

    def add(residual, _):
        new = residual.clone()
        x = residual[0, 1:].double()
        new[0, 1:] += (-4.5 * x.std(1, keepdim=True) * random_sae().dictionary.W_dec[3].double()).float()
        return new

    _, logits = hook_residuals(model._module, torch.tensor([model.tokenizer(PROMPT).input_ids]), {layer: add}.items())
    p = logits[0, -1].double().softmax(0)
    assert [one["id"] for one in found["top"]["steered"]] == p.argsort(descending=True)[:4].tolist()
    assert [one["probability"] for one in found["top"]["steered"]] == pytest.approx(p.sort(descending=True).values[:4].tolist(), rel=1e-3)


def test_factor_zero_changes_nothing(explorer):
    _, found = ask(explorer, "POST", "/api/steer", {**STEER, "factor": 0})
    assert found["kl"]["steered"] == 0
    assert found["top"]["steered"] == found["top"]["model"]


def test_latents_have_the_examples_that_are_known(explorer):
    assert ask(explorer, "GET", "/api/latents/3")[1]["examples"] == [
        {"latent": 3, "site": 2, "activation": 1.5, "tokens": ["w1", "<script>alert(1)</script>"], "at": 1, "document": f"{7:016x}"}
    ]
    assert ask(explorer, "GET", "/api/latents/5")[1]["examples"] == []
    _, unknown = ask(explorer, "GET", f"/api/latents/{LATENTS - 1}")
    assert unknown["examples"] is None
    assert f"--latents {LATENTS - 1}" in unknown["remedy"]


def test_about_and_the_page(explorer):
    _, about = ask(explorer, "GET", "/api/about?x=1")
    assert (about["latents"], about["layers"], about["examples"], about["lens"]) == (LATENTS, list(range(BLOCKS)), [3, 5], False)
    status, page = ask(explorer, "GET", "/")
    assert status == 200
    assert page.count("<script") == 1
    assert not re.search(r"https?:|url\(|@import|innerHTML|eval\(", page)


def test_behind_a_lens(model):
    lens = random_lens()
    sae = random_sae(lens=lens)
    with pytest.raises(MomentsError, match="a way back to layer 0"):
        Explorer(model, sae)
    back = {ResidualSite(n): AffineMap.make(n, n, torch.eye(16).double(), torch.zeros(16), torch.zeros(16)) for n in range(BLOCKS - 1)}
    behind, plain = Explorer(model, sae, back=back), Explorer(model, random_sae())
    prompts = [ask(one, "POST", "/api/prompt", {"prompt": PROMPT})[1]["active"] for one in (behind, plain)]
    assert prompts[0] != prompts[1]
    dense = dense_codes(model, sae, torch.tensor([model.tokenizer(PROMPT).input_ids]), lens)[0][:, 0]
    cell = prompts[0][0]
    assert dict(cell["latents"]) == pytest.approx({f: dense[cell["site"], cell["position"], f] for f, _ in cell["latents"]}, abs=1e-2)
    steered = [ask(one, "POST", "/api/steer", {**STEER, "factor": 30})[1]["kl"]["steered"] for one in (behind, plain)]
    assert steered[0] > 0
    assert steered[0] != pytest.approx(steered[1])


def test_embed_is_a_layer(model):
    explorer = Explorer(model, random_sae(sites=(-1, 1)))
    assert ask(explorer, "GET", "/api/about")[1]["layers"] == ["embed", 1]
    status, found = ask(explorer, "POST", "/api/steer", {**STEER, "layer": "embed"})
    assert (status, found["site"]) == (200, "embed")
    assert ask(explorer, "POST", "/api/steer", STEER)[0] == 400  # layer 0 is not the first of its layers


@pytest.mark.model
def test_an_answer_for_twenty_tokens_is_small():
    """18 layers, 5,120 latents, k = 32: dense, it would have 1.8 million numbers."""
    model = load_model()
    weights = torch.randn(640, 5120, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(5120), torch.zeros(640)
    dictionary = Dictionary("topk", weights, zero[0], weights.T / weights.norm(dim=0)[:, None], zero[1], zero[1], "layer_norm", k=32)
    explorer = Explorer(model, MultiLayerSAE(dictionary, tuple(map(ResidualSite, range(18)))))
    prompt = EXAMPLE + " the one who had asked"
    status, found = ask(explorer, "POST", "/api/prompt", {"prompt": prompt})
    assert (status, len(found["tokens"])) == (200, 20)
    assert sum(len(cell["latents"]) for cell in found["active"]) > 5_000
    assert len(json.dumps(found)) < 1e6


# ---- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "record", "name", "message"),
    [
        ("prompt", {"prompt": 3}, "prompt", "give some words"),
        ("prompt", {"prompt": " \n"}, "prompt", "give some words"),
        ("prompt", {"prompt": "a \ud800 b"}, "prompt", "half a character"),
        ("prompt", {"prompt": "w1 " * 513}, "prompt", "514 tokens; give at most 512"),
        ("prompt", {"prompt": PROMPT, "position": 9}, "position", "a whole number from 0 to 8"),
        ("prompt", {"prompt": PROMPT, "position": True}, "position", "a whole number"),
        ("prompt", {"prompt": PROMPT, "posit": 1}, "posit", "no field here: give prompt, position"),
        ("prompt", {}, "prompt", "prompt is missing"),
        ("prompt", [PROMPT], None, "no object"),
        ("steer", {**STEER, "prompt": None}, "prompt", "give some words"),
        ("steer", {**STEER, "prompt": "w1 " * 600}, "prompt", "at most 512"),
        ("steer", {**STEER, "latent": LATENTS}, "latent", f"from 0 to {LATENTS - 1}"),
        ("steer", {**STEER, "latent": -1}, "latent", "from 0"),
        ("steer", {**STEER, "latent": 3.0}, "latent", "a whole number"),
        ("steer", {**STEER, "latent": "3"}, "latent", "a whole number"),
        ("steer", {**STEER, "layer": BLOCKS}, "layer", "give one of [0, 1, 2, 3]"),
        ("steer", {**STEER, "layer": None}, "layer", "give one of"),
        ("steer", {**STEER, "layer": False}, "layer", "give one of"),
        ("steer", {**STEER, "layer": [0]}, "layer", "give one of"),
        ("steer", {**STEER, "factor": "10"}, "factor", "a number between -1000000 and 1000000"),
        ("steer", {**STEER, "factor": float("nan")}, "factor", "a number"),
        ("steer", {**STEER, "factor": float("inf")}, "factor", "a number"),
        ("steer", {**STEER, "factor": 10**400}, "factor", "a number"),
        ("steer", {**STEER, "positions": "first"}, "positions", "give last or all"),
        ("steer", {**STEER, "positions": []}, "positions", "give last or all"),
        ("steer", {**STEER, "count": 0}, "count", "from 1 to 50"),
        ("steer", {"prompt": PROMPT}, "latent", "latent is missing"),
    ],
)
def test_bad_fields_are_named(explorer, path, record, name, message):
    status, found = ask(explorer, "POST", f"/api/{path}", record)
    assert status == 400
    assert found["error"]["field"] == name
    assert message in found["error"]["message"]


def test_steering_beyond_what_numbers_hold_is_refused(model):
    sae = random_sae()
    huge = dataclasses.replace(sae, dictionary=dataclasses.replace(sae.dictionary, W_dec=sae.dictionary.W_dec * 1e36))
    status, found = ask(Explorer(model, huge), "POST", "/api/steer", {**STEER, "factor": 1e6})
    assert (status, found["error"]["field"]) == (400, "factor")
    assert "not finite; give a smaller one" in found["error"]["message"]


def test_a_prompt_longer_than_the_models_context(model):
    model._module.config.max_position_embeddings = 6
    status, found = ask(Explorer(model, random_sae()), "POST", "/api/prompt", {"prompt": PROMPT})
    assert (status, found["error"]["field"]) == (400, "prompt")
    assert "at most 6 tokens" in found["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 50_000, b'{"prompt": 1' + b"0" * 5000 + b"}"])
def test_bodies_that_are_no_json(explorer, body):
    status, found = ask(explorer, "POST", "/api/prompt", body=body)
    assert status == 400
    assert "no JSON: send an object with prompt, position" in found["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/api/about", {"Host": None}, 403),
        ("GET", "/api/about", {"Host": "evil.example:8000"}, 403),
        ("GET", "/", {"Host": "127.0.0.1:8001"}, 403),
        ("GET", "/", {"Host": "127.0.0.1"}, 403),
        ("GET", "/api/about", {"Origin": "http://evil.example"}, 403),
        ("GET", "/api/about", {"Origin": "null"}, 403),
        ("GET", "/api/about", {"Origin": "http://127.0.0.1:8000"}, 200),
        ("GET", "/api/about", {"Host": "localhost:8000"}, 200),
        ("POST", "/api/prompt", {"Content_Type": "text/plain"}, 415),
        ("POST", "/api/prompt", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/api/steer", {"Content_Type": "multipart/form-data; boundary=application/json"}, 415),
        ("GET", "/favicon.ico", {}, 404),
        ("GET", "/../setup.cfg", {}, 404),
        ("GET", "http://127.0.0.1:8000/", {}, 404),
        ("GET", "/api/latents/N", {}, 404),
        ("GET", "/api/latents/-1", {}, 404),
        ("GET", "/api/latents/٣", {}, 404),
        ("GET", f"/api/latents/{LATENTS}", {}, 404),
        ("POST", "/", {}, 405),
        ("GET", "/api/prompt", {}, 405),
        ("OPTIONS", "/api/steer", {}, 405),
        ("DELETE", "/api/latents/3", {}, 405),
    ],
)
def test_requests_that_are_not_the_pages(explorer, method, path, headers, status):
    headers = {"Content-Type" if name == "Content_Type" else name: value for name, value in headers.items()}
    assert ask(explorer, method, path, {"prompt": PROMPT}, **headers)[0] == status


@pytest.mark.parametrize(
    ("host", "header", "admitted"),
    [
        ("127.0.0.1", "localhost:8000", True),
        ("localhost", "LOCALHOST:8000", True),
        ("::1", "[::1]:8000", True),
        ("127.0.0.1", "127.0.0.1.evil.example:8000", False),
        ("127.0.0.1", "192.0.2.7:8000", False),
        ("127.0.0.1", "a@127.0.0.1:8000", False),
        ("127.0.0.1", "127.0.0.1:8000:8000", False),
        ("0.0.0.0", "192.0.2.7:8000", True),
        ("0.0.0.0", "evil.example:8000", False),
        ("192.0.2.7", "192.0.2.7:8000", True),
        ("192.0.2.7", "localhost:8000", False),
        ("box.example", "box.example:8000", True),
    ],
)
def test_host_headers(host, header, admitted):
    assert Address(host, 8000).admits(header) is admitted


def test_addresses():
    assert [
        Address(host, 1).loopback for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "", "192.0.2.7", "x")
    ] == [
        *[True] * 4,
        *[False] * 5,
    ]
    assert Address("::1", 5).url == "http://[::1]:5/"
    assert Address("0.0.0.0", 5).url == f"http://{socket.gethostname()}:5/"


# ---- a real server -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve():
    """Starts servers on free ports of this machine, each in a thread, and ends them."""
    running = []

    def start(explorer):
        server = PageServer("127.0.0.1", 0)
        thread = threading.Thread(target=server.answer, args=(explorer,))
        thread.start()
        running.append((server, thread))
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex((server.address.host, server.address.port)) == 0:
                    return server.address
            time.sleep(0.02)
        raise TimeoutError

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join(30)
        assert not thread.is_alive()


def send(address, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(address.host, address.port, timeout=60)
    headers = {"Content-Type": "application/json", **(headers or {})}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    read = answer.read()
    connection.close()
    return answer, read


def test_a_server_answers_every_route_and_sets_no_header_of_cors(serve, explorer):
    address = serve(explorer)
    requests = {"/api/prompt": {"prompt": PROMPT}, "/api/steer": STEER}
    for route, method in ROUTES.items():
        path = route.replace("/N", "/3")
        body = None if method == "GET" else json.dumps(requests[route])
        for headers in ({}, {"Origin": address.url.rstrip("/")}):
            answer, read = send(address, method, path, body, headers)
            assert answer.status == 200
            assert not [name for name in answer.headers if name.lower().startswith("access-control")]
            assert dict(answer.headers).items() >= HEADERS.items()
            assert int(answer.headers["Content-Length"]) == len(read)
            assert answer.headers["Server"] is None
        wanted = ask(explorer, method, path, requests.get(route))[1]
        assert (read.decode() if route == "/" else json.loads(read)) == wanted
    answer, read = send(address, "OPTIONS", "/api/prompt", headers={"Origin": "http://evil.example"})
    assert answer.status == 403
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    answer, read = send(address, "HEAD", "/")
    assert (answer.status, answer.headers["Allow"], read) == (405, "GET", b"")


def test_many_at_once_get_the_answers_of_one_at_a_time(serve, explorer):
    address = serve(explorer)
    bodies = [json.dumps({**STEER, "latent": latent, "factor": 20}) for latent in range(8)]
    alone = [send(address, "POST", "/api/steer", body)[1] for body in bodies]
    together = [b""] * len(bodies)

    def one(number):
        together[number] = send(address, "POST", "/api/steer", bodies[number])[1]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone)) == len(alone)


def raw(address, *parts):
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_requests_without_an_end_or_too_large(serve, explorer):
    address = serve(explorer)
    head = f"POST /api/prompt HTTP/1.1\r\nHost: 127.0.0.1:{address.port}\r\nContent-Type: application/json\r\n".encode()
    assert b" 411 " in raw(address, head + b"\r\n")
    assert b" 411 " in raw(address, head + b"Content-Length: -5\r\n\r\n")
    assert b" 411 " in raw(address, head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert b" 413 " in raw(address, head + f"Content-Length: {10**12}\r\n\r\n".encode())
    answer, read = send(address, "POST", "/api/prompt", json.dumps({"prompt": "w1 " * 30_000}))
    assert answer.status == 413
    assert f"at most {MOST_BODY}" in json.loads(read)["error"]["message"]
    assert b" 400 " in raw(address, head + b"Content-Length: 50\r\n\r\n{")  # less than was said
    for nonsense in (b"nonsense\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"):
        status, _, rest = raw(address, nonsense).partition(b"\r\n")
        assert re.match(rb"HTTP/1.0 (400|414|501) ", status)
        assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert send(address, "GET", "/api/about")[0].status == 200


def test_an_unexpected_error_is_named_here_and_not_there(serve, model, capfd):
    class Broken(Explorer):
        def about(self):
            raise RuntimeError("a secret")

    address = serve(Broken(model, random_sae()))
    answer, read = send(address, "GET", "/api/about")
    assert answer.status == 500
    assert json.loads(read) == {"error": {"field": None, "message": "the server failed; its terminal says how"}}
    assert capfd.readouterr().err == "nnato mlsae serve: RuntimeError: a secret\n"
    assert send(address, "GET", "/api/latents/3")[0].status == 200


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OutputError, match="in use; choose another --port"):
            PageServer("127.0.0.1", taken.getsockname()[1])


# ---- examples in files ---------------------------------------------------------------------------------------------------------


GOOD = {"latent": 3, "site": 1, "activation": 1.5, "tokens": ["a", "b"], "at": 1, "document": "0" * 15 + "7"}


def test_examples_are_read_as_they_were_written(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"3": [GOOD], "4": []}))
    found = read_examples(tmp_path, random_sae())
    assert found == {3: [Example(3, ResidualSite(1), 1.5, ("a", "b"), 1, 7)], 4: []}
    assert found[3][0].to_json() == GOOD


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "something else than a JSON object"),
        ({str(LATENTS): []}, "is no latent of the SAE, which has 64"),
        ({"-1": []}, "is no latent"),
        ({"3": {}}, "no list"),
        ({"3": [1]}, "no object"),
        ({"4": [GOOD]}, "of another one"),
        ({"3": [{**GOOD, "site": BLOCKS}]}, "where the SAE is not read"),
        ({"3": [{**GOOD, "site": [1]}]}, "where the SAE is not read"),
        ({"3": [{**GOOD, "activation": None}]}, "activation is not a float"),
        ({"3": [{**GOOD, "activation": float("nan")}]}, "no finite activation"),
        ({"3": [{**GOOD, "tokens": ["a", 1]}]}, "something else than text"),
        ({"3": [{**GOOD, "at": 2}]}, "at none of its tokens"),
        ({"3": [{**GOOD, "at": True}]}, "at is not a int"),
        ({"3": [{**GOOD, "document": "7"}]}, "names no document"),
    ],
)
def test_hostile_examples_are_refused(tmp_path, record, message):
    (tmp_path / FILE).write_text(json.dumps(record))
    with pytest.raises(FileFormatError, match=re.escape(message)):
        read_examples(tmp_path / FILE, random_sae())


# ---- the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return authors_checkpoint(tmp_path_factory.mktemp("serve") / "sae")


def test_dry_run(folder, saved_model, text):
    command = ["mlsae", "serve", f"mlsae:{folder}", "--model", str(saved_model), "--prompt", PROMPT, "--dry-run"]
    runner = CliRunner()
    found = json.loads(runner.invoke(main, [*command, "--json"]).stdout)["results"]
    assert [row["status"] for row in found] == [200] * 5
    assert [re.sub(r"\d+", "N", row["route"]).split()[1] for row in found] == [
        "/",
        "/api/about",
        "/api/prompt",
        "/api/latents/N",
        "/api/steer",
    ]
    words = ["--text", str(text), "--context", "32", "--tokens", "2000"]
    made = runner.invoke(main, ["mlsae", "examples", *command[2:5], *words, "--out", str(folder)])
    assert made.exit_code == 0, made.output
    shown = runner.invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "POST /api/steer" in shown.stdout
    (folder / FILE).write_text("{")
    refused = runner.invoke(main, command)
    assert (refused.exit_code, "damaged or no JSON" in refused.stderr) == (2, True)
    (folder / FILE).unlink()


def test_dry_run_behind_a_lens(folder, saved_model, text, tmp_path):
    words = ["--text", str(text), "--context", "32", "--per-document", "0", "--tokens", "100000"]
    runner, model = CliRunner(), ["--model", str(saved_model)]
    made = runner.invoke(main, ["lens", "fit", *model, *words, "--out", str(tmp_path)])
    assert made.exit_code == 0, made.output
    command = ["mlsae", "serve", f"mlsae:{folder}", *model, *words, "--lens", str(tmp_path), "--prompt", PROMPT, "--dry-run", "--json"]
    found = json.loads(runner.invoke(main, command).stdout)["results"]
    assert [row["status"] for row in found] == [200] * 5


def test_a_rehearsal_that_fails_says_so(model):
    class Broken(Explorer):
        def steer(self, fields):
            raise MomentsError("no")

    assert [answer.status for _, answer in rehearse(Broken(model, random_sae(), opening=PROMPT))] == [200, 200, 200, 200, 400]


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("0.0.0.0", marks=pytest.mark.slow)])
def test_serving_until_ctrl_c(folder, saved_model, host):
    code = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom nnato.cli import main\nmain()"
    command = [sys.executable, "-c", code, "mlsae", "serve", f"mlsae:{folder}", "--model", str(saved_model), "--host", host, "--port", "0"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["results"]["url"]
            address = Address("127.0.0.1", int(url.rstrip("/").rsplit(":", 1)[1]))
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex((address.host, address.port)) == 0:
                        break
                time.sleep(0.05)
            answer, read = send(address, "POST", "/api/steer", json.dumps(STEER))
            assert (answer.status, json.loads(read)["site"]) == (200, 0)
        finally:
            process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert ("no password" in errors) == (host == "0.0.0.0")
    assert "Traceback" not in errors


# ---- the page ------------------------------------------------------------------------------------------------------------------

PROBE = """<script>
const seen = {errors: []};
window.addEventListener("error", (event) => seen.errors.push(event.message));
window.addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
window.addEventListener("securitypolicyviolation", (event) => seen.errors.push(event.violatedDirective + " " + event.blockedURI));
const by = (id) => document.getElementById(id), cells = (id) => by(id).querySelectorAll("td.cell").length;
async function until(what) {
  for (let turn = 0; turn < 400 && !what(); turn++) await new Promise((done) => setTimeout(done, 25));
  return what();
}
(async () => {
  await until(() => cells("map"));
  by("prompt").value = "w3 w5 w7 w11";
  by("ask").requestSubmit();
  await until(() => by("tokens").children.length === 5);
  seen.tokens = [...by("tokens").children].map((token) => token.textContent);
  seen.whole = cells("map");
  by("tokens").children[2].click();
  await until(() => by("map-title").textContent.includes("w5"));
  seen.one = cells("map");
  by("tokens").children[2].click();
  await until(() => by("map-title").textContent.includes("prompt"));
  document.querySelector('#map tr[data-latent="3"] button').click();
  await until(() => by("examples").querySelector("mark"));
  seen.marked = by("examples").querySelector("mark").textContent;
  seen.grid = cells("by-token");
  seen.filled = [...by("by-token").querySelectorAll("td.cell")].filter((cell) => cell.textContent).length;
  by("layer").selectedIndex = 0;
  by("factor").value = "-7.5";
  by("steer").requestSubmit();
  await until(() => by("steered").children.length);
  seen.steered = by("kl").textContent;
  seen.columns = [...by("steered").querySelectorAll("table")].map((table) => table.rows.length);
  by("prompt").value = "w1 ".repeat(600);
  by("ask").requestSubmit();
  await until(() => by("wrong").textContent);
  seen.wrong = by("wrong").textContent;
  seen.kept = by("tokens").children.length;
  seen.wider = document.documentElement.scrollWidth > window.innerWidth;
})().catch((error) => seen.errors.push(String(error))).finally(() => document.body.setAttribute("data-seen", JSON.stringify(seen)));
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page in")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_in_a_browser(serve, model, tmp_path, width):
    sae = random_sae()
    explorer = Explorer(model, sae, examples={3: [Example(3, ResidualSite(2), 1.5, ("w1", "<b>\n"), 1, 7)]})
    explorer.page = explorer.page.replace("</body>", PROBE)
    address = serve(explorer)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900"]
    command = ["chromium", *flags, "--virtual-time-budget=60000", "--dump-dom", address.url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    seen = json.loads(unescape(re.search(r'data-seen="([^"]*)"', shown.stdout)[1]))
    assert seen["errors"] == []
    assert seen["tokens"] == ["<bos>", "w3", "w5", "w7", "w11"]
    wanted = ask(explorer, "POST", "/api/prompt", {"prompt": "w3 w5 w7 w11"})[1]
    assert seen["whole"] == len(wanted["heat_map"]["rows"]) * BLOCKS
    at_token = ask(explorer, "POST", "/api/prompt", {"prompt": "w3 w5 w7 w11", "position": 2})[1]
    assert seen["one"] == len(at_token["heat_map"]["rows"]) * BLOCKS
    assert seen["marked"] == "<b>⏎"
    assert seen["grid"] == BLOCKS * 5
    assert seen["filled"] == sum(3 in dict(cell["latents"]) for cell in wanted["active"]) > 0
    steered = ask(explorer, "POST", "/api/steer", {"prompt": "w3 w5 w7 w11", "latent": 3, "layer": 0, "factor": -7.5})[1]
    assert seen["steered"].startswith("Latent 3, layer 0, factor -7.5.")
    assert f"steered {steered['kl']['steered']:.3f} nats" in seen["steered"]
    assert seen["columns"] == [10] * 4
    assert "give at most 512" in seen["wrong"]
    assert seen["kept"] == 5  # what was shown stays
    assert not seen["wider"]  # tables scroll, the page does not
