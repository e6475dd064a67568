"""The loop corpus × model → statistic: one forward pass per batch, checkpoints, resumption."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.corpus import SPLITS, Corpus, TokenBatch, TokenBlocks
from nnato.errors import ActivationError, FileFormatError, MomentsError, SiteError, TextError
from nnato.models import ModelInfo, check_text, describe
from nnato.moments import TransportMoments
from nnato.sites import Pair, ResidualSite, default_pairs, default_sites, grid, make_pair
from nnato.statistics import NonFinite, Progress, ResidualBatch, Statistic
from nnato.storage import SCHEMA, check_space, prepare_cache, prepare_folder, provenance, read_artifact, require, write_artifact
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnsight import TransformersModel

FILE = "moments.safetensors"
KIND = "moments"
TOKENS_PER_DIMENSION = 80
"""Tokens read by default, per dimension of the residual stream (51,200 at d_model 640; the paper uses 108)."""
SINK_RATIO = 10.0
"""A token is a sink if its norm exceeds this multiple of the median norm at any captured site."""


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


def capture(model: TransformersModel, ids: torch.Tensor, sites: Iterable[ResidualSite]) -> torch.Tensor:
    """Residuals of a batch at some sites; blocks behind the last of them do not run.

    Args:
        model: The model.
        ids: int64 (blocks, positions), padded on the right: in a causal model padding then touches no real token.
        sites: Where.

    Returns:
        (sites, blocks, positions, d_model), in the model's dtype, on its device, without gradient.
    """
    sites = tuple(sites)
    with torch.no_grad(), ATOTrace(model, input_ids=ids, use_cache=False, logits_to_keep=1) as t:
        residuals: torch.Tensor = save(torch.stack([t.residual(site) for site in sites]))
        t.skip_after(max(sites))
    return residuals


class TokenClasses:
    """The rule that says which tokens enter the statistics, with counts (METHODS: positions).

    Special tokens, the first position, and tokens whose norm exceeds `SINK_RATIO` times the median at *any* captured site are left out: a
    handful of such tokens can carry nearly all variance and fake an R². Medians come from the first batch and are then frozen.
    """

    def __init__(self, medians: torch.Tensor | None = None) -> None:
        self.medians = medians
        self.excluded: Counter[str] = Counter()
        self.sinks: Counter[int] = Counter()

    def ordinary(self, tokens: TokenBatch, residuals: torch.Tensor) -> torch.Tensor:
        """The ordinary tokens of a batch, bool (blocks, positions)."""
        ordinary, sink, self.medians = classify(residuals, tokens.mask, tokens.special, self.medians)
        first = tokens.mask & ~tokens.special
        first[:, 1:] = False
        self.excluded["special"] += int((tokens.special & tokens.mask).sum())
        self.excluded["first_position"] += int(first.sum())
        self.excluded["sink"] += int(sink.sum())
        self.sinks.update(tokens.ids[sink.cpu()].tolist())
        return ordinary


def classify(
    residuals: torch.Tensor, mask: torch.Tensor, special: torch.Tensor, medians: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The classes of a batch's tokens. Plain torch: it also runs where nnato is not installed.

    Args:
        residuals: Float (sites, blocks, positions, d_model).
        mask: bool (blocks, positions), true for real tokens.
        special: bool (blocks, positions), true for special tokens.
        medians: Median norms of the sites, float64 (sites,); None takes them from this batch.

    Returns:
        The ordinary tokens and the sinks, bool (blocks, positions) each, and the medians.

    Raises:
        TextError: There is nothing to take medians from.
    """
    candidates = (mask & ~special).to(residuals.device)
    candidates[:, 0] = False
    norms = torch.linalg.vector_norm(residuals, dim=-1, dtype=torch.float64)
    if medians is None:
        if not bool(candidates.any()):
            raise TextError("the first batch holds special tokens and first positions only: is this the model's tokenizer?")
        medians = norms[:, candidates].median(dim=1).values
    sink = candidates & (norms > SINK_RATIO * medians.to(norms.device)[:, None, None]).any(dim=0)
    return candidates & ~sink, sink, medians


def stream(
    model: TransformersModel,
    blocks: TokenBlocks,
    statistic: Statistic,
    request: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    file: Path | None = None,
    batch_size: int = 8,
    checkpoint_every: int = 20,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Feed every batch's residuals to a statistic, once; with a file, from its last checkpoint on.

    Checkpoints lie on batch boundaries and hold state, cursor, frozen medians and request in one file, so a run that was killed ends in
    the same bits as one that was not.

    Args:
        model: The model.
        blocks: The text.
        statistic: What to feed. Restored from the file if there is one.
        request: Identifies the run, in JSON; a file of another request is refused.
        about: More for the file's metadata.
        file: Where to keep checkpoints and the result.
        batch_size: Token blocks per forward pass.
        checkpoint_every: Batches between checkpoints.
        progress: Told of each batch.

    Returns:
        The file's metadata.

    Raises:
        MomentsError: The file holds another request.
        ActivationError: A residual is not finite; the last checkpoint stays as it is.
        OutputError: The file cannot be written.
    """
    plan = blocks.plan(batch_size)
    classes, cursor = TokenClasses(), 0
    if file is not None and file.exists():
        tensors, metadata = read_artifact(file, KIND)
        if metadata.get("request") != dict(request):
            raise MomentsError(f"{file} holds moments of another model, text or request; choose another --out, or delete it")
        cursor = metadata["cursor"]
        statistic.restore(tensors, metadata)
        classes.medians = torch.tensor([metadata["medians"][str(site)] for site in statistic.sites], dtype=torch.float64)
        classes.excluded.update(metadata["excluded"])
        classes.sinks.update({token: count for token, count, _ in metadata["sinks"]})

    def snapshot(cursor: int) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        tensors, own = statistic.state()
        medians = [] if classes.medians is None else classes.medians.tolist()
        sinks = [[token, count, model.tokenizer.decode([token])] for token, count in classes.sinks.most_common()]
        return tensors, own | dict(about) | {
            "request": dict(request),
            "cursor": cursor,
            "batches": len(plan),
            "medians": {str(site): median for site, median in zip(statistic.sites, medians, strict=True)},
            "excluded": dict(classes.excluded),
            "sinks": sinks,
            "provenance": provenance(),
        }

    for number in range(cursor, len(plan)):
        if progress is not None:
            progress("forward passes", number, len(plan))
        _add_batch(model, blocks.batch(plan[number]), statistic, classes)
        if file is not None and (number + 1 == len(plan) or (number + 1) % checkpoint_every == 0):
            write_artifact(file, KIND, *snapshot(number + 1))
    if progress is not None:
        progress("forward passes", len(plan), len(plan))
    return snapshot(len(plan))[1]


def _add_batch(model: TransformersModel, tokens: TokenBatch, statistic: Statistic, classes: TokenClasses) -> None:
    residuals = capture(model, tokens.ids, statistic.sites)
    ordinary = classes.ordinary(tokens, residuals)
    excluded = tokens.mask.to(ordinary.device) & ~ordinary
    documents = tokens.documents.to(ordinary.device)
    try:
        statistic.update(ResidualBatch(residuals, statistic.sites, ordinary, excluded, documents, tokens.split, tokens.fold))
    except NonFinite as error:
        start = model.tokenizer.decode(tokens.ids[error.block][:12].tolist(), skip_special_tokens=True)
        raise ActivationError(
            f"the residual is {error.value} in document {int(tokens.documents[error.block]):016x} (block starting {start!r}), position "
            f"{error.position}, site {error.site}; nothing of this batch was added. Half precision may overflow: try float32"
        ) from None


def accumulate(
    model: TransformersModel,
    corpus: Corpus | TokenBlocks | None = None,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    out: str | Path | None = None,
    batch_size: int = 8,
    checkpoint_every: int = 20,
    device: torch.device | str | None = None,
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
        progress: Told of tokens read and batches done.

    Returns:
        The moments with their origin.

    Raises:
        SiteError: A pair does not exist.
        TextError: The text cannot be read or is too short.
        PositionError: The sequences are longer than the model's context.
        MomentsError: `out` holds moments of another request, or the sums do not fit into memory.
        ActivationError: A residual is not finite.
        OutputError: `out` cannot be written.
    """
    info = describe(model)
    chosen = _check_request(info, pairs, batch_size, checkpoint_every)
    file = prepare_folder(Path(out).expanduser()) / FILE if out is not None else None
    blocks = tokenize(model, corpus or default_corpus(info), progress)
    return _run(model, info, blocks, chosen, file, batch_size, checkpoint_every, device, progress)


def accumulate_cached(
    model: TransformersModel,
    corpus: Corpus | TokenBlocks | None = None,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Accumulated:
    """As `accumulate`, with the result kept in the user's cache under a key of model, text, pairs and schema.

    Pairs that are among the default ones share the cache entry of all default pairs.

    Args:
        model: What `load_model` returned.
        corpus: As in `accumulate`.
        pairs: As in `accumulate`.
        batch_size: As in `accumulate`.
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
    return _run(model, info, blocks, chosen, file, batch_size, 20, None, progress)


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


def _run(
    model: TransformersModel,
    info: ModelInfo,
    blocks: TokenBlocks,
    pairs: tuple[Pair, ...],
    file: Path | None,
    batch_size: int,
    checkpoint_every: int,
    device: torch.device | str | None,
    progress: Progress | None,
) -> Accumulated:
    place = torch.device(device) if device is not None else next(model._module.parameters()).device
    everything, at_once = TransportMoments.bytes_for(pairs, info.d_model, blocks.fingerprint["folds"])
    _check_memory(at_once if file is not None else everything, place)
    if file is not None and not file.exists():
        check_space(file.parent, everything, "ask for fewer sites, pairs or folds")
    moments = TransportMoments(pairs, info.d_model, place, file.parent if file is not None else None)
    metadata = stream(
        model,
        blocks,
        moments,
        request_of(info, blocks.fingerprint, pairs, batch_size),
        {"model": info.fingerprint(), "text": blocks.fingerprint},
        file=file,
        batch_size=batch_size,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    return Accumulated.of(moments, metadata)


def _check_memory(needed: int, device: torch.device) -> None:
    gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.9 * available:
        raise MomentsError(
            f"the moments of these pairs take {needed / 1e9:.1f} GB of memory, and {device} has {available / 1e9:.1f} GB: ask for fewer "
            "sites or pairs" + (', or keep the sums on device "cpu"' if gpu else "")
        )


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
    tensors, metadata = read_artifact(file, KIND)
    for key in (
        "pairs",
        "d_model",
        "rows",
        "files",
        "request",
        "cursor",
        "batches",
        "model",
        "text",
        "medians",
        "excluded",
        "sinks",
    ):
        require(key in metadata, file, f"{key} is missing")
    if metadata["cursor"] != metadata["batches"]:
        raise MomentsError(
            f"{file} is not finished: {metadata['cursor']} of {metadata['batches']} batches; the command that began it resumes it"
        )
    try:
        require(tensors["shuffled.scatter"].shape[1:] == (metadata["d_model"],) * 2, file, "the tensors have another width than d_model")
        moments = TransportMoments((make_pair(*pair) for pair in metadata["pairs"]), metadata["d_model"], folder=file.parent)
        moments.restore(tensors, metadata)
        return Accumulated.of(moments, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, SiteError) as error:
        raise FileFormatError(f"{file} is inconsistent ({type(error).__name__}: {error}); make it again") from None


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
