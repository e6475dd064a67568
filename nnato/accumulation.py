"""Text and model → moments, kept in a folder or in the cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.corpus import SPLITS, Corpus, TokenBlocks
from nnato.errors import FileFormatError, MomentsError, SiteError
from nnato.models import ModelInfo, check_text, describe
from nnato.notebook import html_table
from nnato.reduction import SINK_RATIO
from nnato.remote import Server
from nnato.remote_moments import RemoteMoments
from nnato.shards import Shard
from nnato.sites import Pair, default_pairs, default_sites, grid, make_pair
from nnato.statistics import Progress
from nnato.storage import (
    SCHEMA,
    Metadata,
    check_space,
    exclusive,
    prepare_cache,
    prepare_folder,
    read_artifact,
    require,
    require_entries,
    write_artifact,
)
from nnato.streaming import stream
from nnato.transport_moments import TransportMoments, check_memory

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

FILE = "moments.safetensors"
KIND = "moments"
_RECORDS = ("rows", "files", "request", "model", "text", "medians", "excluded", "provenance")
TOKENS_PER_DIMENSION = 80
"""Tokens read by default, per dimension of the residual stream (51,200 at d_model 640; the paper uses 108)."""


@dataclass(frozen=True)
class Accumulated:
    """Moments with all that says where they come from.

    Attributes:
        moments: The moments.
        model: Fingerprint of the model.
        text: Fingerprint of the text.
        tokens: Ordinary tokens by split.
        excluded: Excluded tokens by reason: `special`, `first_position`, `sink`.
        sink_tokens: The most frequent sink tokens, as text, with their counts.
        medians: Median residual norm by site, the sink rule's measure.
        provenance: Versions and command.
    """

    moments: TransportMoments
    model: dict[str, Any]
    text: dict[str, Any]
    tokens: dict[str, int]
    excluded: dict[str, int]
    sink_tokens: dict[str, int]
    medians: dict[str, float]
    provenance: dict[str, Any]

    def _repr_html_(self) -> str:
        rows = [(split, count) for split, count in self.tokens.items()]
        rows += [(f"left out: {reason.replace('_', ' ')}", count) for reason, count in self.excluded.items()]
        origin = f"{self.model['name']}, {self.text['source']}, {self.text['documents']} documents"
        title = f"Moments of {len(self.moments.pairs)} pairs · {origin}"
        return html_table(title, ("tokens", "count"), rows, "pairs: " + ", ".join(f"{s} → {t}" for s, t in self.moments.pairs))

    @staticmethod
    def of(moments: TransportMoments, metadata: Mapping[str, Any]) -> Accumulated:
        """Moments with the metadata of their file."""
        sinks: Counter[str] = Counter()
        for _, count, text in metadata["sinks"]:
            sinks[text] += count
        return Accumulated(
            moments=moments,
            model=metadata["model"],
            text=metadata["text"],
            tokens={split: moments.tokens(split) for split in SPLITS},
            excluded=metadata["excluded"],
            sink_tokens=dict(sinks.most_common(10)),
            medians=metadata["medians"],
            provenance=metadata["provenance"],
        )


def accumulate(
    model: TransformersModel,
    corpus: Corpus | TokenBlocks | None = None,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    out: str | Path | None = None,
    batch_size: int = 8,
    checkpoint_every: int = 20,
    device: torch.device | str | None = None,
    server: Server | None = None,
    per_job: int = 64,
    keep_excluded: bool = False,
    products: torch.dtype = torch.float64,
    null: bool = True,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> Accumulated:
    """Stream text through a model once and fold the residuals into moments.

    Args:
        model: What `load_model` returned.
        corpus: The text, tokenised already or not; by default the embedded one, 80 tokens per dimension of the residual stream.
        pairs: (source, target) pairs; by default all pairs of about seven sites spread over the depth.
        out: A folder. Checkpoints and the result go there, and the same call resumes or, when it is complete, only reads it. Sums of folds
            that are complete are then held on disk only.
        batch_size: Token blocks per forward pass. Another one gives the same moments to rounding only.
        checkpoint_every: Batches between checkpoints; what a crash can lose at most.
        device: Where the float64 sums are kept; by default where the model is. "cpu" spares the memory of a GPU.
        server: Run the forward passes on it, e.g. `NdifServer()`, and fetch sums only; a failed job is all that a rerun repeats.
        per_job: Batches in one job on a server, at most.
        keep_excluded: Whether a server also sends sums of special tokens, first positions and sinks, which takes up to twice the bytes.
            Without them there is no R² with all tokens. Here they are always kept.
        products: dtype in which the rows of ordinary tokens are multiplied; `torch.float32` takes half the time, and still adds up in
            float64 (see `Moments`).
        null: Whether to add up shuffled pairs, too, which costs up to 60 % of what the pairs themselves do. Without them there is no
            `shuffled` baseline, and no effective sample size: tokens count as independent.
        shard: Read this part of the text only; `merging.merge_shards` puts the results of all parts together. Needs `out`.
        progress: Told of tokens read and batches done.

    Returns:
        The moments with their origin.

    Raises:
        SiteError: A pair does not exist.
        TextError: The text cannot be read or is too short.
        PositionError: The sequences are longer than the model's context.
        MomentsError: `out` holds moments of another request, the sums do not fit into memory, or a shard has no `out`.
        ActivationError: A residual is not finite.
        RemoteError: A job on the server failed.
        OutputError: `out` cannot be written.
    """
    info = describe(model)
    chosen = _check_request(info, pairs, batch_size, checkpoint_every)
    file = prepare_folder(Path(out).expanduser()) / FILE if out is not None else None
    blocks = tokenize(model, corpus or default_corpus(info), progress)
    if shard is not None and (file is None or server is not None):
        raise MomentsError("a shard needs a folder to keep it in (out), and runs here: a server's jobs are parts of the text already")
    if products != torch.float64 and server is not None:
        raise MomentsError("a server multiplies in float64: products in float32 are for runs here")
    excluded = keep_excluded or server is None
    run = _Run(file, batch_size, checkpoint_every, device, server, per_job, excluded, products, null, shard, progress)
    return run(model, info, blocks, chosen)


def accumulate_cached(
    model: TransformersModel,
    corpus: Corpus | TokenBlocks | None = None,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    batch_size: int = 8,
    server: Server | None = None,
    progress: Progress | None = None,
) -> Accumulated:
    """As `accumulate`, with the result kept in the user's cache under a key of model, text, pairs and schema.

    Pairs that are among the default ones share the cache entry of all default pairs.

    Args:
        model: What `load_model` returned.
        corpus: As in `accumulate`.
        pairs: As in `accumulate`.
        batch_size: As in `accumulate`.
        server: As in `accumulate`.
        progress: As in `accumulate`.
    """
    info = describe(model)
    chosen = _check_request(info, pairs, batch_size, 1)
    everything = default_pairs_of(info)
    chosen = everything if set(chosen) <= set(everything) else chosen
    blocks = tokenize(model, corpus or default_corpus(info), progress)
    request = json.dumps(request_of(info, blocks.fingerprint, chosen, batch_size), sort_keys=True)
    key = hashlib.blake2b(request.encode(), digest_size=12).hexdigest()
    file = prepare_cache("moments", key) / FILE
    run = _Run(file, batch_size, 20, None, server, 64, server is None, torch.float64, True, None, progress)
    return run(model, info, blocks, chosen)


def _check_request(
    info: ModelInfo, pairs: Iterable[tuple[int | str, int | str]] | None, batch_size: int, checkpoint_every: int
) -> tuple[Pair, ...]:
    if batch_size < 1 or checkpoint_every < 1:
        raise MomentsError(f"batch size {batch_size} and checkpoint interval {checkpoint_every} must be at least 1")
    chosen = default_pairs_of(info) if pairs is None else tuple(sorted({make_pair(s, t, info.blocks) for s, t in pairs}))
    if not chosen:
        raise SiteError("no pairs to accumulate: give at least one (source, target)")
    return chosen


def tokenize(model: TransformersModel, corpus: Corpus | TokenBlocks, progress: Progress | None = None) -> TokenBlocks:
    """The token blocks of a corpus for a model, checked to fit it.

    Args:
        model: The model.
        corpus: The text; token blocks are only checked.
        progress: Told of tokens read.

    Raises:
        TextError: The text cannot be read or is too short.
        PositionError: The sequences are longer than the model's context.
        ModelError: The tokenizer does not belong to the model.
    """
    check_text(model, corpus.context)
    if isinstance(corpus, Corpus):
        tokens = corpus.tokens
        corpus = corpus.tokenize(model.tokenizer, progress and (lambda done: progress("tokenising", done, tokens)))
    check_text(model, corpus.context, len(corpus.special) - 1)
    return corpus


@dataclass(frozen=True)
class _Run:
    """One accumulation: where its sums go, and how its batches are run."""

    file: Path | None
    batch_size: int
    checkpoint_every: int
    device: torch.device | str | None
    server: Server | None
    per_job: int
    keep_excluded: bool
    products: torch.dtype
    null: bool
    shard: Shard | None
    progress: Progress | None

    def __call__(self, model: TransformersModel, info: ModelInfo, blocks: TokenBlocks, pairs: tuple[Pair, ...]) -> Accumulated:
        place = torch.device("cpu") if self.server is not None else next(model._module.parameters()).device
        place = torch.device(self.device) if self.device is not None else place
        everything, at_once = TransportMoments.bytes_for(pairs, info.d_model, blocks.fingerprint["folds"], self.null)
        if self.shard is not None:  # its documents lie in few folds
            everything = min(everything, everything // self.shard.count + 2 * at_once)
        check_memory(at_once if self.file is not None else everything, place)
        if self.file is not None and not self.file.exists():
            check_space(self.file.parent, everything, "ask for fewer sites, pairs or folds")
        folder = self.file.parent if self.file is not None else None
        moments = TransportMoments(pairs, info.d_model, place, folder, self.products, self.null)
        remote = None
        if self.server is not None:
            remote = RemoteMoments(self.server, self.per_job, moments, self.keep_excluded)
            remote.announce(blocks, blocks.plan(self.batch_size))
        metadata = stream(
            model,
            blocks,
            moments,
            request_of(info, blocks.fingerprint, pairs, self.batch_size) | self._unusual(),
            {"model": info.fingerprint(), "text": blocks.fingerprint},
            file=self.file,
            batch_size=self.batch_size,
            checkpoint_every=self.checkpoint_every,
            remote=remote,
            shard=self.shard,
            progress=self.progress,
        )
        if self.shard is not None and self.file is not None:
            _close(self.file, moments, metadata)
        return Accumulated.of(moments, metadata)

    def _unusual(self) -> dict[str, Any]:
        """What else identifies the request; what is as usual goes without saying, as in files of earlier versions."""
        products = {} if self.products == torch.float64 else {"products": str(self.products).removeprefix("torch.")}
        return {"excluded": self.keep_excluded} | products | ({} if self.null else {"null": False})


def _close(file: Path, moments: TransportMoments, metadata: Metadata) -> None:
    """Put every part of a finished shard into a file of its own, so that shards can be merged part by part."""
    if metadata["rows"]:
        with exclusive(file):
            moments.close()
            write_artifact(file, KIND, {}, metadata | moments.state()[1])


def load_moments(path: str | Path) -> Accumulated:
    """Read moments that `accumulate` or `nnato accumulate` wrote.

    Args:
        path: The folder given as `out`, or the file in it.

    Raises:
        FileFormatError: No such file, or not a readable one of this kind.
        MomentsError: The accumulation is not finished, or its parts do not fit together.
    """
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise FileFormatError(f"no moments in {path}: give the --out folder of nnato accumulate")
    tensors, metadata = read_artifact(file, KIND)
    check_finished(file, metadata)
    if "shard" in metadata:
        raise MomentsError(f"{file} holds one shard of a text only: nnato merge puts all its shards together")
    try:
        widths = {tensor.shape[-1] for tensor in tensors.values()}
        require(widths <= {metadata["d_model"]}, file, "the tensors have another width than d_model")
        moments = TransportMoments((make_pair(*pair) for pair in metadata["pairs"]), metadata["d_model"], folder=file.parent)
        moments.restore(tensors, metadata)
        return Accumulated.of(moments, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, SiteError) as error:
        raise FileFormatError(f"{file} is inconsistent ({type(error).__name__}: {error}); make it again") from None


def check_finished(file: Path, metadata: Metadata) -> None:
    """Refuse the metadata of moments that lack something, or of a run that has not come to its end.

    Raises:
        FileFormatError: Something is missing.
        MomentsError: The run has not ended.
    """
    require_entries(metadata, file, d_model=int, cursor=int, batches=int, pairs=list, sinks=list, **dict.fromkeys(_RECORDS, dict))
    check_ended(file, metadata)


def check_ended(file: Path, metadata: Metadata) -> None:
    """Refuse what a run that has not come to its end left.

    Raises:
        MomentsError: The run has not ended.
    """
    if metadata["cursor"] != metadata["batches"]:
        raise MomentsError(
            f"{file} is not finished: {metadata['cursor']} of {metadata['batches']} batches; the command that began it resumes it"
        )


def default_pairs_of(info: ModelInfo) -> tuple[Pair, ...]:
    """All pairs of the default sites of a model."""
    return grid(default_sites(info.blocks)) or default_pairs(info.blocks)


def default_corpus(info: ModelInfo) -> Corpus:
    """The embedded text, as much of it as the width of a model asks for."""
    return Corpus(tokens=TOKENS_PER_DIMENSION * info.d_model)


def request_of(info: ModelInfo, text: Mapping[str, Any], pairs: Iterable[Pair], batch_size: int) -> dict[str, Any]:
    """What identifies moments, in JSON: the contents of model and text (not their names), pairs, batching, rules, schema."""
    return {
        "schema": SCHEMA,
        "model": {**info.contents(), "config": info.config},
        "text": {"digest": text["digest"], "context": text["context"]},
        "pairs": [[source.key, target.key] for source, target in pairs],
        "batch_size": batch_size,
        "sink_ratio": SINK_RATIO,
    }
