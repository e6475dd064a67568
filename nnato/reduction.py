"""From residuals to sums, where the model is: capture, token classes, and the sums of some batches.

Everything here is plain functions and classes on torch and traces, so that it can run on a server where nnato is not installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nnato.errors import ActivationError, TextError
from nnato.moments import Moments, add_batch, pack
from nnato.sites import Pair, ResidualSite
from nnato.statistics import NonFinite, non_finite
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.corpus import TokenBatch
    from nnato.nnsight_setup import TransformersModel

SINK_RATIO = 10.0
"""A token is a sink if its norm exceeds this multiple of the median norm at any captured site."""


def capture(model: TransformersModel, ids: torch.Tensor, sites: Iterable[ResidualSite]) -> torch.Tensor:
    """Residuals of a batch at some sites; blocks behind the last of them do not run, and no logits are made.

    Args:
        model: The model.
        ids: int64 (blocks, positions), padded on the right: in a causal model padding then touches no real token.
        sites: Where.

    Returns:
        (sites, blocks, positions, d_model), in the model's dtype, on its device, without gradient.
    """
    sites = tuple(sites)
    with torch.no_grad(), ATOTrace(model, input_ids=ids, use_cache=False, logits_to_keep=1) as t:
        residuals: torch.Tensor = save(stacked(model, t, sites))
        t.skip_after(max(sites))
        t.skip_head()
    return residuals


def stacked(model: TransformersModel, t: ATOTrace, sites: Iterable[ResidualSite]) -> torch.Tensor:
    """Residuals of a running trace at some sites, together on one device even if the model is spread over several.

    Args:
        model: The model.
        t: The trace.
        sites: Where.

    Returns:
        (sites, blocks, positions, d_model), where the model's first weights are, or the first of these residuals if those are nowhere.
    """
    residuals = [t.residual(site) for site in sites]
    first = next(model._module.parameters()).device
    place = residuals[0].device if first.type == "meta" else first
    return torch.stack([residual.to(place) for residual in residuals])


class TokenClasses:
    """The rule that says which tokens enter the statistics, with counts (METHODS: positions).

    Special tokens, the first position, and tokens whose norm exceeds `SINK_RATIO` times the median at *any* captured site are left out: a
    handful of such tokens can carry nearly all variance and fake an R². Medians come from the first batch and are then frozen.
    """

    def __init__(self, medians: torch.Tensor | None = None) -> None:
        self.medians = medians
        self.excluded: Counter[str] = Counter()
        self.sinks: Counter[int] = Counter()

    def ordinary(self, ids: torch.Tensor, mask: torch.Tensor, special: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """The ordinary tokens of a batch (ids, mask and special tokens as in `TokenBatch`), bool (blocks, positions)."""
        ordinary, sink, self.medians = classify(residuals, mask, special, self.medians)
        first = mask & ~special
        first[:, 1:] = False
        self.excluded.update(special=int((special & mask).sum()), first_position=int(first.sum()), sink=int(sink.sum()))
        self.sinks.update(ids[sink.cpu()].tolist())
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


class Sums(Protocol):
    """What a job adds up: an instance of a plain class, which travels to the server while it is empty."""

    def add(self, residuals: torch.Tensor, ordinary: torch.Tensor, excluded: torch.Tensor, documents: torch.Tensor) -> None:
        """Add a batch; the arguments are what `ResidualBatch` calls them."""

    def packed(self) -> dict[str, Any]:
        """All sums as plain data, for the way back."""


class MomentSums:
    """Moments of some batches of one fold.

    Args:
        pairs: (source, target) pairs.
        d_model: Width of the residual stream.
        keep_excluded: Whether to add up excluded tokens too.
        keep_shuffled: Whether to add up shuffled pairs.
    """

    def __init__(self, pairs: Sequence[Pair], d_model: int, keep_excluded: bool, keep_shuffled: bool) -> None:
        self.pairs, self.d_model, self.keep_excluded, self.keep_shuffled = pairs, d_model, keep_excluded, keep_shuffled
        self.ordinary: Moments | None = None
        self.excluded: Moments | None = None
        self.shuffled: Moments | None = None

    def add(self, residuals: torch.Tensor, ordinary: torch.Tensor, excluded: torch.Tensor, documents: torch.Tensor) -> None:
        """Add a batch."""
        if self.ordinary is None:  # only residuals say where the model computes: a sandbox's own copy of the model has no weights
            device = residuals.device
            self.ordinary = Moments.of_pairs(self.pairs, self.d_model, device)
            self.excluded = Moments.of_pairs(self.pairs, self.d_model, device) if self.keep_excluded else None
            self.shuffled = Moments(self.pairs, self.d_model, device) if self.keep_shuffled else None
        add_batch(residuals, ordinary, excluded, documents, self.ordinary, self.excluded, self.shuffled)

    def packed(self) -> dict[str, Any]:
        """Packed moments by name: `ordinary`, `excluded`, `shuffled`."""
        parts = {"ordinary": self.ordinary, "excluded": self.excluded, "shuffled": self.shuffled}
        return {name: pack(part) for name, part in parts.items() if part is not None}


def collect(
    model: TransformersModel,
    label: str,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    sites: Sequence[ResidualSite],
    medians: torch.Tensor | None,
    sums: Sums,
) -> dict[str, Any]:
    """Reduce some batches of one fold to sums; plain torch and traces, so that it runs as one job on a server.

    Args:
        model: The model.
        label: Comes back as it is.
        batches: Of each batch its ids, mask, special tokens (as in `TokenBatch`) and document numbers.
        sites: Where residuals are read.
        medians: Median norms of the sites, once they are known.
        sums: What is added up.

    Returns:
        Plain data: what `sums` packs, `medians`, counts of excluded tokens by reason, sink tokens with their counts, the dtype of the
        residuals; or, of the first value that is not finite, only its place.
    """
    classes, dtype = TokenClasses(medians), ""
    for number, (ids, mask, special, documents) in enumerate(batches):
        residuals = capture(model, ids, sites)
        dtype = str(residuals.dtype).removeprefix("torch.")
        if place := non_finite(residuals, mask.to(residuals.device)):
            return {"label": label, "not_finite": [number, *place]}
        chosen = classes.ordinary(ids, mask, special, residuals)
        rest = mask.to(chosen.device) & ~chosen
        sums.add(residuals, chosen, rest, documents.to(chosen.device))
    counts, sinks = dict(classes.excluded), dict(classes.sinks)
    return {**sums.packed(), "label": label, "medians": classes.medians, "counts": counts, "sinks": sinks, "dtype": dtype}


def located(place: NonFinite, model: TransformersModel, tokens: TokenBatch) -> ActivationError:
    """The error about a value that is not finite, with its document."""
    start = model.tokenizer.decode(tokens.ids[place.block][:12].tolist(), skip_special_tokens=True)
    return ActivationError(
        f"the residual is {place.value} in document {int(tokens.documents[place.block]):016x} (block starting {start!r}), position "
        f"{place.position}, site {place.site}; nothing of this batch was added. Half precision may overflow: try float32"
    )
