"""Text: documents from files, the hub or the standard library, cut into token blocks and split by document."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnato.errors import PositionError, TextError

DEFAULT_TEXT = "python-docs"
SPLITS = ("train", "validation", "test")
FRACTIONS = (0.6, 0.2, 0.2)
FOLDED = ("train", "test")
"""Splits whose documents are divided into folds: for cross-validation, and for intervals."""
PASSAGE = 4000
"""Characters from which a passage of a single .txt file, cut at blank lines, counts as a document of its own."""


@dataclass(frozen=True)
class Corpus:
    """Where text comes from and how it is cut.

    Attributes:
        source: `"python-docs"` (documentation of the installed Python's standard library, the embedded default), a `.txt` file (cut at
            blank lines into passages, which count as documents; UTF-8, else Latin-1), a `.jsonl` file, a folder of `.txt` files (one
            document each), or a `datasets` id, streamed: `owner/name`, or `datasets:PATH_OR_ID[:CONFIG]`.
        context: Tokens of one block, special tokens included.
        tokens: Stop after the block with which this many tokens are reached; `None` reads everything.
        per_document: Take at most so many blocks of one document, so that a few long ones do not make up the text; `None` takes all.
        column: Name of the text field in `.jsonl` files and data sets.
        folds: Parts into which the documents of the train and of the test split are divided. Moments are kept of each, for
            cross-validation and for intervals over groups of documents; more folds give better intervals, and take more disk.

    A document always falls into the same split, in every corpus: its place is a hash of its text and nothing else. So what one run
    fitted on, no other run tests on.
    """

    source: str = DEFAULT_TEXT
    context: int = 256
    tokens: int | None = None
    per_document: int | None = 2
    column: str = "text"
    folds: int = 5

    def __post_init__(self) -> None:
        if self.per_document is not None and self.per_document < 1:
            raise TextError(f"per_document {self.per_document}: take at least one block of each document")
        if self.context < 8:
            raise PositionError(f"context {self.context}: a block needs at least 8 tokens")
        if self.tokens is not None and self.tokens < 1:
            raise TextError(f"tokens {self.tokens}: ask for at least one")
        if self.folds < 1:
            raise TextError(f"folds {self.folds}: there is at least one")

    def documents(self) -> Iterator[str]:
        """The documents, in a fixed order.

        Raises:
            TextError: The source does not exist or cannot be read.
        """
        yield from self.open()()

    def open(self) -> Callable[[], Iterator[str]]:
        """See that the source is there, without reading it or asking the network; what returns reads the documents.

        Raises:
            TextError: There is no such source, or it may not be read.
        """
        path = Path(self.source).expanduser()
        if self.source == DEFAULT_TEXT:
            return python_docs
        if self.source.startswith("datasets:"):
            return functools.partial(_dataset, self.source.removeprefix("datasets:"), self.column)
        if path.is_dir():
            files = sorted(path.glob("*.txt"))
            if not files:
                raise TextError(f"{path} holds no .txt file")
            _check_readable(files)
            return lambda: (_read(file) for file in files)
        if path.is_file():
            _check_readable([path])
            return functools.partial(_jsonl, path, self.column) if path.suffix == ".jsonl" else lambda: _passages(_read(path))
        if self.source.count("/") == 1 and not path.suffix and not self.source.startswith((".", "/", "~")) and self.source[-1] != "/":
            return functools.partial(_dataset, self.source, self.column)
        raise TextError(
            f"no text {self.source!r}: not {DEFAULT_TEXT!r}, a .txt or .jsonl file, a folder of .txt files, or a datasets id owner/name"
        )

    def _files_in_folder(self) -> int | None:
        """How many documents a folder holds; of other sources that is not known without reading them to their end."""
        path = Path(self.source).expanduser()
        return len(list(path.glob("*.txt"))) if self.source != DEFAULT_TEXT and path.is_dir() else None

    def tokenize(self, tokenizer: Any, progress: Callable[[int], None] | None = None) -> TokenBlocks:
        """Tokenise documents into blocks; blocks of one document never fall into two splits.

        Each block starts with the special tokens that the tokenizer puts first (BOS, if any). A last block is kept short.

        Args:
            tokenizer: A transformers tokenizer.
            progress: Called with the number of tokens so far after each document.

        Raises:
            TextError: The source cannot be read, or a split would be empty.
        """
        prefix = _prefix(tokenizer)
        body = self.context - len(prefix)
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the blocks
        digest = hashlib.blake2b(digest_size=16)
        rows: list[tuple[int, ...]] = []
        seen, tokens, documents, largest, whole = 0, 0, 0, 0, True
        for text in self.documents():
            identity = _hash(text, "split")
            split = _split(identity)
            document = identity & (2**63 - 1)
            # The split looks at the leading bits of the hash, the fold at the trailing ones.
            fold = document % self.folds if SPLITS[split] in FOLDED else 0
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            for block, start in enumerate(range(0, len(ids), body)[: self.per_document]):
                piece = np.array(prefix + ids[start : start + body], dtype=np.int32)
                if len(piece) - len(prefix) < 2:
                    break  # one token has nothing to predict
                if self.tokens is not None and tokens >= self.tokens:
                    break
                spool.write(piece.tobytes())
                digest.update(piece.tobytes() + b"%d,%d" % (split, fold))
                largest = max(largest, int(piece.max()))
                rows.append((seen, len(piece), split, document, _order(identity, block), fold))
                seen, tokens = seen + len(piece), tokens + len(piece)
            documents += 1
            if progress is not None:
                progress(tokens)
            if self.tokens is not None and tokens >= self.tokens:
                whole = False  # as far as is known: the next document was not asked for
                break
        spool.flush()
        index = np.array(rows, dtype=np.int64).reshape(-1, 6)
        counts = {name: int(index[index[:, 2] == code, 1].sum()) for code, name in enumerate(SPLITS)}
        if empty := [name for name, count in counts.items() if not count]:
            raise TextError(
                f"text {self.source!r} is too short: {documents} document{'s' * (documents != 1)} with {tokens} tokens leave nothing for "
                f"{' and '.join(empty)} (documents are split {FRACTIONS[0]:.0%}/{FRACTIONS[1]:.0%}/{FRACTIONS[2]:.0%} "
                "by their hash); give more text, or more --tokens"
            )
        largest = max([largest, *tokenizer.all_special_ids])
        there = documents if whole else self._files_in_folder()
        fingerprint = {
            **asdict(self),
            "documents": documents,
            "documents_there": there,
            "split_tokens": counts,
            "digest": digest.hexdigest(),
        }
        special = torch.zeros(largest + 1, dtype=torch.bool)
        special[tokenizer.all_special_ids] = True
        return TokenBlocks(spool, index, special, self.context, fingerprint)


@dataclass(frozen=True)
class TokenBatch:
    """Some token blocks of one split, padded on the right.

    Attributes:
        ids: int64 (blocks, positions).
        mask: bool (blocks, positions), true for real tokens.
        special: bool (blocks, positions), true for special tokens (BOS, EOS, …).
        documents: int64 (blocks,), hash of the document each block comes from.
        split: `train`, `validation` or `test`.
        fold: Fold of the split.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    special: torch.Tensor
    documents: torch.Tensor
    split: str
    fold: int


@dataclass(frozen=True)
class TokenBlocks:
    """Tokenised text. The ids lie in an unnamed temporary file, so memory does not grow with them; 48 bytes per block do stay in memory.

    Attributes:
        spool: The file with all ids, int32.
        index: int64 (blocks, 6): offset and length in tokens, split, document hash, place in the order of blocks, fold.
        special: bool (largest token id + 1,), true for special tokens.
        context: Tokens of a full block.
        fingerprint: What identifies this text: its source, how it was cut, counts, and a digest of ids, splits and folds.
    """

    spool: Any = field(repr=False)
    index: np.ndarray = field(repr=False)
    special: torch.Tensor = field(repr=False)
    context: int
    fingerprint: dict[str, Any]

    def plan(self, batch_size: int) -> list[np.ndarray]:
        """Row numbers of each batch: fold by fold, long blocks first, blocks otherwise in an order drawn from document hashes.

        So neighbours in a batch mostly come from different documents, and padding is rare.
        """
        batches = []
        for code in range(len(SPLITS)):
            for fold in np.unique(self.index[self.index[:, 2] == code, 5]):
                rows = np.flatnonzero((self.index[:, 2] == code) & (self.index[:, 5] == fold))
                rows = rows[np.lexsort((self.index[rows, 4], -self.index[rows, 1]))]
                batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        return batches

    def work(self, plan: Iterable[np.ndarray]) -> list[int]:
        """Positions, padding included, of each batch of a plan: what a forward pass costs, up to a factor."""
        return [len(rows) * int(self.index[rows, 1].max()) for rows in plan]

    def only(self, split: str) -> TokenBlocks:
        """The blocks of one split."""
        return replace(self, index=self.index[self.index[:, 2] == SPLITS.index(split)])

    def _full(self, split: str) -> np.ndarray:
        return np.flatnonzero((self.index[:, 2] == SPLITS.index(split)) & (self.index[:, 1] == self.context))

    def count_full(self, split: str) -> int:
        """How many blocks of a split have full length."""
        return len(self._full(split))

    def full_blocks(self, split: str, count: int) -> np.ndarray:
        """Row numbers of full-length blocks of a split, one per document as far as they go, then second ones, and so on.

        Raises:
            TextError: There are fewer full blocks.
        """
        rows = self._full(split)
        if len(rows) < count:
            fewer = f", or ask for {len(rows)} (--sequences {len(rows)}; of mlsae layers --costs {len(rows)})" if len(rows) > 1 else ""
            raise TextError(
                f"{count} sequences of {self.context} tokens were asked for, but the {split} documents hold {len(rows)}; "
                f"give more text, or a shorter context{fewer}"
            )
        rows = rows[np.argsort(self.index[rows, 4], kind="stable")]
        turn = np.zeros(len(rows), dtype=np.int64)
        taken: dict[int, int] = {}
        for place, document in enumerate(self.index[rows, 3].tolist()):
            turn[place] = taken[document] = taken.get(document, -1) + 1
        return rows[np.argsort(turn, kind="stable")][:count]

    def batch(self, rows: Iterable[int]) -> TokenBatch:
        """Read blocks of one fold."""
        index = self.index[np.asarray(rows, dtype=np.int64)]
        ids = torch.zeros(len(index), int(index[:, 1].max()), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, (offset, length) in enumerate(index[:, :2].tolist()):
            raw = os.pread(self.spool.fileno(), 4 * length, 4 * offset)
            ids[row, :length] = torch.from_numpy(np.frombuffer(raw, dtype=np.int32).astype(np.int64))
            mask[row, :length] = True
        return TokenBatch(ids, mask, self.special[ids] & mask, torch.from_numpy(index[:, 3]), SPLITS[index[0, 2]], int(index[0, 5]))


# ---- hashing -----------------------------------------------------------------------------------------------------------


def _hash(text: str, salt: str) -> int:
    """A stable 64-bit hash of a document: its identity, the same in every process and order; exact duplicates stay together."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, salt=salt.encode()).digest())


def _split(identity: int) -> int:
    share = identity / 2**64
    return 0 if share < FRACTIONS[0] else 1 if share < FRACTIONS[0] + FRACTIONS[1] else 2


def _order(identity: int, block: int) -> int:
    return int.from_bytes(hashlib.blake2b(b"%d,%d" % (identity, block), digest_size=8).digest()) >> 1


def _prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    places = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    return list(full[: places[0]]) if places else []


# ---- sources -----------------------------------------------------------------------------------------------------------


def python_docs() -> Iterator[str]:
    """Documentation of the installed Python's standard library: its topics and each module's docstrings, in an order by hash.

    About 300 documents and 480,000 tokens of technical English. It varies with the Python version.

    Raises:
        TextError: This Python ships without it.
    """
    documents: list[str] = []
    with contextlib.suppress(ImportError):  # some distributions leave the topics out; the docstrings below suffice
        documents += importlib.import_module("pydoc_data.topics").topics.values()
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and deliberately broken samples
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
        joined = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        if len(joined) > 1500:
            documents.append(joined)
    if not documents:
        raise TextError(f"this Python has no documentation of its standard library under {root}; give a --text of your own")
    yield from sorted(documents, key=lambda text: _hash(text, "order"))


def _check_readable(files: Iterable[Path]) -> None:
    for path in files:
        if not os.access(path, os.R_OK):
            raise TextError(f"cannot read {path}: it is gone, or you may not read it; give another text, or change its permissions")


def _read(path: Path) -> str:
    """A text file, UTF-8 or else Latin-1."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from None
    if b"\0" in raw:
        raise TextError(f"{path} is no text: it holds NUL bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _passages(text: str) -> Iterator[str]:
    """Cut one long text at blank lines into passages of at least `PASSAGE` characters; at any line end from twice as many on."""
    passage: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if size >= 2 * PASSAGE or (size >= PASSAGE and not passage[-1].strip()):
            yield "".join(passage)
            passage, size = [], 0
        passage.append(line)
        size += len(line)
    if "".join(passage).strip():
        yield "".join(passage)


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise TextError(f"{path}, line {number}, is not JSON in UTF-8: {error}") from None
            yield _field(record, column, f"{path}, line {number}")


def _dataset(name: str, column: str) -> Iterator[str]:
    """Stream the train split of a `datasets` id or folder, `NAME[:CONFIG]`."""
    from datasets import load_dataset

    name, _, config = name.partition(":")
    number = 0
    try:
        for record in load_dataset(name, config or None, split="train", streaming=True):
            number += 1
            yield _field(record, column, f"data set {name}, record {number}")
    except (OSError, ValueError, RuntimeError) as error:  # connections fail as OSError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TextError(
            f"cannot stream the data set {name!r} (record {number + 1}): {lines[0][:300]}; check the id and the network, "
            "or give a local file"
        ) from None


def _field(record: Any, column: str, where: str) -> str:
    value = record.get(column) if isinstance(record, dict) else None
    if not isinstance(value, str):
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise TextError(f"{where} has no text in field {column!r} (it has: {known}); name it with --column")
    return value
