"""Explanations from a server on this machine, from exported files, from the cache; and what is said where there are none."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from nnato import explanations
from nnato.errors import DictionaryError, FileFormatError, RemoteError
from nnato.explanations import explain, fetch, read_export

SAE = "gemma-2-2b/20-gemmascope-res-16k"


def record(index, text, author="gpt-4o-mini", layer="20-gemmascope-res-16k"):
    return {"modelId": "gemma-2-2b", "layer": layer, "index": str(index), "description": text, "explanationModelName": author}


RECORDS = [
    record(12, "cities"),
    record(3, "verbs"),
    record(12, "names of cities", None),
    record(3, "of another", layer="1-other"),
    "odd",
    {},
]


@pytest.fixture
def server():
    """A site whose answer tests choose; it keeps the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            self.send_response(site.status)
            self.end_headers()
            self.wfile.write(site.answer)

        def log_message(self, *arguments):
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.asked, site.status, site.answer = [], 200, json.dumps(RECORDS).encode()
    site.base = f"http://127.0.0.1:{site.server_port}"
    thread = threading.Thread(target=site.serve_forever)
    thread.start()
    yield site
    site.shutdown()
    thread.join()
    site.server_close()


def test_explanations_are_fetched_once_and_all_kept(server):
    got = explain(SAE, [12, 7, 3], base=server.base + "/")
    assert got.unavailable is None
    assert list(got.found) == [12, 7, 3]
    assert [one.text for one in got.found[12]] == ["cities", "names of cities"]
    assert [one.author for one in got.found[12]] == ["gpt-4o-mini", None]
    assert got.found[7] == []
    assert [one.text for one in got.found[3]] == ["verbs"]
    assert got.link(12) == f"{server.base}/{SAE}/12"
    assert got.to_json()[1] == {"feature": 7, "link": f"{server.base}/{SAE}/7", "explanations": []}
    (asked,) = server.asked
    assert urlsplit(asked).path == "/api/explanation/export"
    assert parse_qs(urlsplit(asked).query) == {"modelId": ["gemma-2-2b"], "saeId": ["20-gemmascope-res-16k"]}
    assert explain(SAE, [12, 7, 3], base=server.base).found == got.found
    assert len(server.asked) == 1
    (cached,) = explanations.prepare_cache("explanations").glob("*.json")
    for damage in ("[", "[3]", '[{"index": 3}]', "[" * 9999):
        cached.write_text(damage)
        assert explain(SAE, [12, 7, 3], base=server.base).found == got.found
    assert len(server.asked) == 5


def test_without_an_answer_there_are_links_and_a_reason(server, monkeypatch):
    for status, answer in ((404, b"[]"), (200, b"<html>"), (200, b'{"a": 1}'), (200, b"[" * 9999), (500, b"")):
        server.status, server.answer = status, answer
        got = explain(SAE, [3], base=server.base)
        assert "no explanations from http://127.0.0.1" in got.unavailable
        assert got.to_json() == [{"feature": 3, "link": f"{server.base}/{SAE}/3", "explanations": []}]
    server.status, server.answer = 200, json.dumps(RECORDS).encode()
    monkeypatch.setattr(explanations, "MOST_BYTES", 50)
    assert "larger than" in explain(SAE, [3], base=server.base).unavailable
    assert "no explanations" in explain(SAE, [3], base="http://127.0.0.1:9").unavailable
    with pytest.raises(RemoteError, match="no address of a site"):
        fetch(SAE, "file:///etc")


def test_a_silent_server_is_given_up(monkeypatch):
    import socket

    monkeypatch.setattr(explanations, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        got = explain(SAE, [3], base=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "timed out" in got.unavailable


@pytest.mark.parametrize("packed", [True, False])
def test_exported_files(tmp_path, packed):
    """METHODS acceptance 29."""
    text = "\n".join(json.dumps(one) for one in RECORDS) + "\n\n"
    file = tmp_path / ("batch-0.jsonl.gz" if packed else "batch-0.jsonl")
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert [(one.index, one.text) for one in read_export(file, SAE)] == [(3, "verbs"), (12, "cities"), (12, "names of cities")]
    got = explain(SAE, [12], base="http://127.0.0.1:9", export=file)
    assert got.unavailable is None
    assert len(got.found[12]) == 2
    with pytest.raises(FileFormatError, match="holds no explanation of gemma-2-2b/other"):
        read_export(file, "gemma-2-2b/other")
    for content in (b"no gzip, no json", gzip.compress(b"{")[:-6], gzip.compress(b"[" * 9999)):
        file.write_bytes(content)
        with pytest.raises(FileFormatError, match="no export of explanations"):
            read_export(file, SAE)
    with pytest.raises(FileFormatError, match="no export"):
        read_export(tmp_path / "nothing.jsonl", SAE)


def test_a_packed_file_that_grows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(explanations, "MOST_BYTES", 1000)
    file = tmp_path / "bomb.jsonl.gz"
    file.write_bytes(gzip.compress(b" " * 100_000))
    with pytest.raises(FileFormatError, match="larger than"):
        read_export(file, SAE)


def test_names():
    for wrong in ("gemma-2-2b", "a/b/c", "../b", "a/..", "a b/c", ""):
        with pytest.raises(DictionaryError, match="model/source"):
            explain(wrong, [1])
