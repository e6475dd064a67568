"""What others say that latents mean: explanations from Neuronpedia, or from files exported there. They are shown as text only."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnato.dictionaries import NEURONPEDIA
from nnato.errors import DictionaryError, FileFormatError, RemoteError, first_line
from nnato.storage import atomic, prepare_cache

TIMEOUT = 20.0
"""Seconds without a byte after which a server is given up."""
MOST_BYTES = 256_000_000
"""Size of an answer, or of an unpacked file, that is read."""


@dataclass(frozen=True)
class Explanation:
    """One explanation of one latent.

    Attributes:
        sae: Where on Neuronpedia, e.g. `gemma-2-2b/20-gemmascope-res-16k`.
        index: The latent.
        text: What it is said to mean.
        author: The model that wrote it, if known.
    """

    sae: str
    index: int
    text: str
    author: str | None = None


@dataclass(frozen=True)
class Explained:
    """Explanations of some latents, in the order asked for.

    Attributes:
        sae: Where on Neuronpedia.
        base: Of the addresses.
        found: By latent, all there are; an empty list where there are none.
        unavailable: Why none could be had; None if they could.
    """

    sae: str
    base: str
    found: Mapping[int, Sequence[Explanation]]
    unavailable: str | None = None

    def link(self, latent: int) -> str:
        """Address of a latent's page."""
        return f"{self.base}/{self.sae}/{latent}"

    def to_json(self) -> list[dict[str, Any]]:
        """As in `--json`: one entry per latent."""
        return [
            {
                "feature": latent,
                "link": self.link(latent),
                "explanations": [{"text": one.text, "author": one.author} for one in some],
            }
            for latent, some in self.found.items()
        ]


def explain(sae: str, latents: Iterable[int], *, base: str = NEURONPEDIA, export: Path | None = None) -> Explained:
    """Explanations of latents: from a file, else from the cache, else from the network; if there is none, the links alone.

    Args:
        sae: Where on Neuronpedia: `model/source`.
        latents: Which.
        base: Address of the site.
        export: A file exported there, `.jsonl` or `.jsonl.gz`, to be used instead of the network.

    Raises:
        DictionaryError: `sae` is no such name.
        FileFormatError: The file cannot be read, or holds something else.
    """
    check_name(sae)
    unavailable, every = None, []
    try:
        every = read_export(export, sae) if export is not None else _cached(sae, base)
    except RemoteError as error:
        unavailable = str(error)
    found: dict[int, list[Explanation]] = {latent: [] for latent in latents}
    for one in every:
        if one.index in found:
            found[one.index].append(one)
    return Explained(sae, base.rstrip("/"), found, unavailable)


def check_name(sae: str) -> None:
    """Refuse what is no name of an SAE on Neuronpedia.

    Raises:
        DictionaryError: With an example of one.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", sae) or ".." in sae:
        raise DictionaryError(f"{sae!r} names no SAE of Neuronpedia: write model/source, for example gemma-2-2b/20-gemmascope-res-16k")


def fetch(sae: str, base: str = NEURONPEDIA) -> list[Explanation]:
    """All explanations of an SAE, by one request.

    Args:
        sae: `model/source`.
        base: Address of the site.

    Raises:
        RemoteError: There is no network, or the answer is too large or something else.
    """
    model, source = sae.split("/")
    if urllib.parse.urlsplit(base).scheme not in ("http", "https"):
        raise RemoteError(f"{base!r} is no address of a site: give one that begins with https://")
    address = f"{base.rstrip('/')}/api/explanation/export?{urllib.parse.urlencode({'modelId': model, 'saeId': source})}"
    request = urllib.request.Request(address, headers={"Accept": "application/json", "User-Agent": "nnato"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content = answer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise RemoteError(f"the answer of {base} is larger than {MOST_BYTES / 1e6:.0f} MB: use a file exported there")
        records = json.loads(content)
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:  # URLError and time-outs are OSError
        raise RemoteError(f"no explanations from {base}: {first_line(error)}") from None
    if not isinstance(records, list):
        raise RemoteError(f"no explanations from {base}: the answer is no list")
    return _of_records(records, sae)


def read_export(path: str | Path, sae: str) -> list[Explanation]:
    """Explanations of an SAE from a file exported by Neuronpedia: one JSON object in each line, packed by gzip or not.

    Args:
        path: `.jsonl` or `.jsonl.gz`.
        sae: `model/source`; those of others are left out.

    Raises:
        FileFormatError: It cannot be read, is too large, or holds something else.
    """
    path = Path(path).expanduser()
    try:
        raw = path.open("rb")
        with raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise FileFormatError(f"{path} is larger than {MOST_BYTES / 1e6:.0f} MB unpacked")
        records = [json.loads(line) for line in content.splitlines() if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is no export of explanations that can be read: {first_line(error)}") from None
    found = _of_records(records, sae)
    if records and not found:
        raise FileFormatError(f"{path} holds no explanation of {sae}")
    return found


def _cached(sae: str, base: str) -> list[Explanation]:
    """From the cache, filled by one request."""
    key = hashlib.blake2b(f"{base.rstrip('/')} {sae}".encode(), digest_size=12).hexdigest()
    file = prepare_cache("explanations") / f"{key}.json"
    if file.exists():
        try:
            return [Explanation(**record) for record in json.loads(file.read_text())]
        except (OSError, ValueError, TypeError, RecursionError):
            file.unlink()  # damaged: it is fetched again
    found = fetch(sae, base)
    with atomic(file) as temporary:
        temporary.write_text(json.dumps([asdict(one) for one in found]))
    return found


def _of_records(records: Iterable[Any], sae: str) -> list[Explanation]:
    """Records of Neuronpedia that belong to an SAE and are complete, in order of latents; several of a latent as they come."""
    found = []
    for record in records:
        if not isinstance(record, dict) or f"{record.get('modelId')}/{record.get('layer')}" != sae:
            continue
        index, text, author = str(record.get("index")), record.get("description"), record.get("explanationModelName")
        if re.fullmatch(r"[0-9]{1,9}", index) and isinstance(text, str):
            found.append(Explanation(sae, int(index), text, author if isinstance(author, str) else None))
    return sorted(found, key=lambda one: one.index)
