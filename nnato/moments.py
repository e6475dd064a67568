"""Streaming moments of residuals: count, means and centred cross-products, in float64. No activation is kept."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nnato.corpus import FOLDED, SPLITS
from nnato.errors import ActivationError, MomentsError
from nnato.sites import Pair, ResidualSite
from nnato.statistics import ResidualBatch
from nnato.storage import read_artifact, read_metadata, write_artifact

Site = ResidualSite | int


class Moments:
    """Count, means and centred cross-products of rows at several sites; all of it additive.

    For each block (s, t) it keeps the scatter `C_st = Σ (x_s - mean_s)ᵀ (x_t - mean_t)`. Batches are centred about their own means and
    merged by Chan's formula, so a large mean costs no digits. Everything is float64, whatever the dtype of the rows and the ambient
    default or autocast (which exempts float64).

    Attributes:
        sites: The sites, sorted.
        blocks: The (s, t) whose scatter is kept, sorted; s = t is a site's own.
        d_model: Width of a row.
        n: Number of rows so far.
        mean: float64 (2, sites, d_model): of the rows as sources and as targets. They differ only for shuffled pairs.
        scatter: float64 (blocks, d_model, d_model).
    """

    def __init__(self, blocks: Iterable[Pair], d_model: int, device: torch.device | str = "cpu") -> None:
        self.blocks: tuple[Pair, ...] = tuple(sorted(set(blocks)))
        self.sites: tuple[ResidualSite, ...] = tuple(sorted({site for block in self.blocks for site in block}))
        self.d_model = d_model
        self.n = 0
        self.mean = torch.zeros(2, len(self.sites), d_model, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(len(self.blocks), d_model, d_model, dtype=torch.float64, device=device)
        self._interrupted = False

    @classmethod
    def of_pairs(cls, pairs: Iterable[Pair], d_model: int, device: torch.device | str = "cpu") -> Moments:
        """Empty moments with all that these pairs need: their cross blocks and their sites' own."""
        pairs = tuple(pairs)
        own = {(site, site) for pair in pairs for site in pair}
        return cls(own | set(pairs), d_model, device)

    def update(self, rows: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Add rows.

        Args:
            rows: Float (sites, n, d_model); n may be 0.
            targets: The rows as targets, if other than `rows` (same shape); for shuffled pairs.

        Raises:
            ActivationError: Wrong shape or dtype, or a value that is not finite. The moments are unchanged, bit for bit.
        """
        self._check_usable()
        for name, value in (("rows", rows), ("targets", targets)):
            if value is not None:
                self._check_rows(name, value)
        if targets is not None and targets.shape != rows.shape:
            raise ActivationError(f"targets have shape {tuple(targets.shape)}, rows {tuple(rows.shape)}")
        count = rows.shape[1]
        if count == 0:
            return
        total = self.n + count
        x, mean_x = self._centred(rows, 0, total)
        y, mean_y = (x, mean_x) if targets is None else self._centred(targets, 1, total)
        place = {site: i for i, site in enumerate(self.sites)}
        # The one write of many steps: should an interrupt fall into it, the state says so instead of being silently wrong.
        self._interrupted = True
        for block, (source, target) in enumerate(self.blocks):
            self.scatter[block].addmm_(x[place[source]].T, y[place[target]])
        share = count / total
        self.mean[0] += share * (mean_x - self.mean[0])
        self.mean[1] += share * (mean_y - self.mean[1])
        self.n = total
        self._interrupted = False

    def _centred(self, rows: torch.Tensor, side: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows centred about their mean with one row more, whose products are Chan's correction for the two means."""
        count = rows.shape[1]
        centred = torch.empty(len(self.sites), count + 1, self.d_model, dtype=torch.float64, device=self.scatter.device)
        body = centred[:, :count]
        body.copy_(rows.detach())
        mean = body.mean(dim=1)
        body -= mean[:, None]
        centred[:, count] = (mean - self.mean[side]) * (self.n * count / total) ** 0.5
        return centred, mean

    def _check_rows(self, name: str, rows: torch.Tensor) -> None:
        wanted = (len(self.sites), self.d_model)
        if rows.dim() != 3 or (rows.shape[0], rows.shape[2]) != wanted:
            raise ActivationError(f"{name} have shape {tuple(rows.shape)}, not ({wanted[0]} sites, n, d_model {wanted[1]})")
        if not rows.is_floating_point():
            raise ActivationError(f"{name} have dtype {rows.dtype}, not a floating-point one")
        finite = torch.isfinite(rows)
        if not bool(finite.all()):
            site, row, _ = place = torch.nonzero(~finite)[0].tolist()
            raise ActivationError(f"{name}: site {self.sites[site]}, row {row}: the value is {float(rows[tuple(place)])}")

    def _check_usable(self) -> None:
        if self._interrupted:
            raise MomentsError("these moments were interrupted in the middle of an update: load the last checkpoint instead")

    # ---- algebra -------------------------------------------------------------------------------------------------------

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together (Chan's formula). Empty moments are the identity.

        Raises:
            MomentsError: The two have other blocks or another width.
        """
        self._check_like(other)
        n = self.n + other.n
        if not self.n or not other.n:
            return (self if self.n else other).select(self.blocks)
        merged = Moments(self.blocks, self.d_model, self.scatter.device)
        delta = other.mean.to(self.mean.device) - self.mean
        merged.n = n
        merged.mean = self.mean + (other.n / n) * delta
        merged.scatter = self.scatter + other.scatter.to(self.scatter.device)
        merged._add_outer(delta, self.n * other.n / n)
        return merged

    def subtract(self, part: Moments) -> Moments:
        """The moments of the other rows, when `part` is of some of ours. Loses digits if the part is more than about half.

        Raises:
            MomentsError: The two have other blocks or another width, or the part is not smaller.
        """
        self._check_like(part)
        if part.n > self.n:
            raise MomentsError(f"cannot subtract {part.n} rows from {self.n}")
        rest = Moments(self.blocks, self.d_model, self.scatter.device)
        rest.n = self.n - part.n
        if rest.n:
            part_mean = part.mean.to(self.mean.device)
            rest.mean = self.mean + (part.n / rest.n) * (self.mean - part_mean)
            rest.scatter = self.scatter - part.scatter.to(self.scatter.device)
            rest._add_outer(rest.mean - part_mean, -rest.n * part.n / self.n)
        return rest

    def _add_outer(self, delta: torch.Tensor, weight: float) -> None:
        place = {site: i for i, site in enumerate(self.sites)}
        for block, (source, target) in enumerate(self.blocks):
            self.scatter[block].addr_(delta[0, place[source]], delta[1, place[target]], alpha=weight)

    def _check_like(self, other: Moments) -> None:
        self._check_usable()
        other._check_usable()
        if (self.blocks, self.d_model) != (other.blocks, other.d_model):
            raise MomentsError(
                f"moments of {_names(self.blocks)} at width {self.d_model} and of {_names(other.blocks)} at width "
                f"{other.d_model} do not fit together"
            )

    def select(self, blocks: Iterable[Pair]) -> Moments:
        """A copy with these blocks only.

        Raises:
            MomentsError: A block is not there.
        """
        chosen = Moments(blocks, self.d_model, self.scatter.device)
        chosen.n = self.n
        chosen.mean = self.mean[:, [self._site(site) for site in chosen.sites]].clone()
        chosen.scatter = self.scatter[[self._block(*block) for block in chosen.blocks]].clone()
        return chosen

    # ---- reading -------------------------------------------------------------------------------------------------------

    def mean_of(self, site: Site, as_target: bool = False) -> torch.Tensor:
        """Mean of the rows at a site; float64 (d_model,)."""
        self._check_usable()
        return self.mean[int(as_target), self._site(site)]

    def scatter_of(self, source: Site, target: Site) -> torch.Tensor:
        """Centred cross-products `C_st = Σ (x_s - mean_s)ᵀ (x_t - mean_t)`; float64 (d_model, d_model), a site's own symmetrised.

        Raises:
            MomentsError: The block is not there.
        """
        self._check_usable()
        if source == target:
            own = self.scatter[self._block(source, target)]
            return (own + own.T) / 2
        if source > target:
            return self.scatter[self._block(target, source)].T
        return self.scatter[self._block(source, target)]

    def _site(self, site: Site) -> int:
        if site not in self.sites:
            raise MomentsError(f"these moments do not hold site {ResidualSite(site)}; they hold {', '.join(map(str, self.sites))}")
        return self.sites.index(ResidualSite(site))

    def _block(self, source: Site, target: Site) -> int:
        block = (ResidualSite(source), ResidualSite(target))
        if block not in self.blocks:
            raise MomentsError(f"these moments do not hold the pair {block[0]}:{block[1]}; they hold {_names(self.blocks)}")
        return self.blocks.index(block)

    def _take(self, name: str, n: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over stored rows and sums."""
        for part, stored in tensors.items():
            mine: torch.Tensor = getattr(self, part)
            if stored.shape != mine.shape or stored.dtype != torch.float64 or not bool(torch.isfinite(stored).all()):
                raise MomentsError(f"the stored {name}.{part} has another shape or dtype, or values that are not finite")
            mine.copy_(stored)
        if not isinstance(n, int) or n < 0:
            raise MomentsError(f"the stored number of rows of {name} is {n!r}")
        self.n = n


def _names(blocks: Iterable[Pair]) -> str:
    pairs = [f"{source}:{target}" for source, target in blocks if source != target]
    return ", ".join(pairs[:12]) + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else "")


def add_batch(
    residuals: torch.Tensor,
    ordinary: torch.Tensor,
    excluded: torch.Tensor,
    documents: torch.Tensor,
    ordinary_moments: Moments,
    excluded_moments: Moments | None,
    shuffled: Moments | None,
) -> None:
    """Add one batch to moments of each token class and of shuffled pairs. Plain torch: it also runs where nnato is not installed.

    Args:
        residuals: Float (sites, blocks, positions, d_model), finite at real tokens.
        ordinary: bool (blocks, positions).
        excluded: bool (blocks, positions).
        documents: int64 (blocks,).
        ordinary_moments: Of ordinary tokens.
        excluded_moments: Of excluded ones; None leaves them out.
        shuffled: Of pairs of ordinary tokens of different documents; None leaves them out.
    """
    rows = residuals.flatten(1, 2)
    ordinary_moments.update(rows[:, ordinary.flatten()])
    if excluded_moments is not None:
        excluded_moments.update(rows[:, excluded.flatten()])
    if shuffled is not None:
        other = documents != documents.roll(1)
        both = (ordinary & ordinary.roll(1, 0) & other[:, None]).flatten()
        shuffled.update(rows[:, both], residuals.roll(1, 1).flatten(1, 2)[:, both])


PART = "moments-part"


class TransportMoments:
    """Everything operators of some pairs are fitted, chosen and judged by: moments per fold and token class, and of shuffled pairs.

    Parts are named `train.ordinary.0` (split, token class, fold), `train.excluded` (all folds) and `shuffled`. With a folder, only parts
    that are being added to are held in memory; one that is complete goes to a file there, `{name}.safetensors`, and what is asked of it
    later is read from that file.

    Attributes:
        pairs: The (source, target) pairs.
        sites: Their sites, sorted.
        d_model: Width of the residual stream.
        shuffled: Cross moments of ordinary training tokens at the source with tokens of *another document* at the same position of the
            target: what is left of a pair when only position is shared (METHODS: shuffled-pair null).
    """

    def __init__(self, pairs: Iterable[Pair], d_model: int, device: torch.device | str = "cpu", folder: Path | None = None) -> None:
        self.pairs = tuple(sorted(set(pairs)))
        self.d_model = d_model
        self.device = torch.device(device)
        self.folder = folder
        self.shuffled = Moments(self.pairs, d_model, device)
        self.sites = self.shuffled.sites
        self._open: dict[str, Moments] = {}
        self._closed: dict[str, int] = {}

    @staticmethod
    def bytes_for(pairs: Iterable[Pair], d_model: int, folds: int) -> tuple[int, int]:
        """Size of the sums of these pairs: in all, and of the parts that are added to at one time."""
        pairs = set(pairs)
        own = {site for pair in pairs for site in pair}
        part, shuffled = 8 * d_model**2 * (len(pairs) + len(own)), 8 * d_model**2 * len(pairs)
        parts = len(FOLDED) * folds + len(SPLITS) - len(FOLDED) + len(SPLITS)
        return parts * part + shuffled, 2 * part + shuffled

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each part."""
        return self._closed | {key: part.n for key, part in self._open.items()} | {"shuffled": self.shuffled.n}

    def folds(self, split: str) -> tuple[int, ...]:
        """The folds of a split that hold ordinary tokens, sorted."""
        prefix = f"{split}.ordinary."
        return tuple(sorted(int(key.removeprefix(prefix)) for key, n in self.rows.items() if key.startswith(prefix) and n))

    def tokens(self, split: str) -> int:
        """Number of ordinary tokens of a split."""
        return sum(self.rows[f"{split}.ordinary.{fold}"] for fold in self.folds(split))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of parts that are complete."""
        return tuple(self._file(key) for key in self._closed)

    # ---- adding --------------------------------------------------------------------------------------------------------

    def update(self, batch: ResidualBatch) -> None:
        """Add a batch of residuals; refused whole if any real token's residual is not finite.

        Raises:
            NonFinite: With the place; nothing was added.
            MomentsError: The batch belongs to a fold that is complete already.
        """
        batch.check_finite()
        names = (f"{batch.split}.ordinary.{batch.fold}", f"{batch.split}.excluded")
        self._close_all_but(names)
        ordinary, excluded = (self._opened(name) for name in names)
        shuffled = self.shuffled if batch.split == "train" else None
        add_batch(batch.residuals, batch.ordinary, batch.excluded, batch.documents, ordinary, excluded, shuffled)

    def add(self, split: str, fold: int, ordinary: Moments, excluded: Moments | None, shuffled: Moments | None) -> None:
        """Add moments that were accumulated elsewhere, of batches of one fold.

        Args:
            split: `train`, `validation` or `test`.
            fold: Fold of the split.
            ordinary: Of ordinary tokens.
            excluded: Of the others; None if they were not kept.
            shuffled: Of shuffled pairs of ordinary training tokens.

        Raises:
            MomentsError: The moments are of other pairs, or the fold is complete already.
        """
        names = (f"{split}.ordinary.{fold}", f"{split}.excluded")
        self._close_all_but(names)
        merged = {name: self._opened(name).merge(part) for name, part in zip(names, (ordinary, excluded), strict=True) if part is not None}
        both = self.shuffled if shuffled is None else self.shuffled.merge(shuffled)
        self._open |= merged
        self.shuffled = both

    def _close_all_but(self, names: Iterable[str]) -> None:
        """Write parts that are complete to their files. A checkpoint that names such a file is written later, so it always exists."""
        if self.folder is None:
            return
        for key in [key for key in self._open if key not in names]:
            part = self._open[key]
            write_artifact(self._file(key), PART, {"mean": part.mean, "scatter": part.scatter}, self._label(key, part.n))
            self._closed[key] = part.n
            del self._open[key]

    def _opened(self, key: str) -> Moments:
        if key in self._closed:
            raise MomentsError(f"part {key} of the moments is complete: the batches of a fold must come in a row")
        if key not in self._open:
            self._open[key] = Moments.of_pairs(self.pairs, self.d_model, self.device)
        return self._open[key]

    def _file(self, key: str) -> Path:
        if self.folder is None:
            raise MomentsError(f"part {key} of the moments lies in a file, but no folder is known: use load_moments")
        return self.folder / f"{key}.safetensors"

    def _label(self, key: str, n: int) -> dict[str, Any]:
        return {"part": key, "rows": n, "pairs": [[s.key, t.key] for s, t in self.pairs], "d_model": self.d_model}

    # ---- reading -------------------------------------------------------------------------------------------------------

    @property
    def has_excluded(self) -> bool:
        """Whether special tokens, first positions and sinks were kept, so that `tokens="all"` means something."""
        return any(key.endswith(".excluded") for key in self.rows)

    def of(self, split: str, tokens: str = "ordinary", pairs: Iterable[Pair] | None = None, folds: Iterable[int] | None = None) -> Moments:
        """Moments of a split, or of some of its folds.

        Args:
            split: `train`, `validation` or `test`.
            tokens: `ordinary` (default everywhere) or `all`, special tokens, first positions and sinks included.
            pairs: Only these pairs; all by default.
            folds: Only these folds; all by default. Only of ordinary tokens.

        Raises:
            MomentsError: There are no such tokens, not this pair, or no such fold.
            FileFormatError: The file of a part is missing or damaged.
        """
        if tokens not in ("ordinary", "all"):
            raise MomentsError(f"tokens {tokens!r}: use 'ordinary' or 'all'")
        if folds is not None and tokens == "all":
            raise MomentsError("folds are kept of ordinary tokens only")
        if tokens == "all" and not self.has_excluded:
            raise MomentsError("these moments hold ordinary tokens only: accumulate again with the excluded ones")
        there = self.folds(split)
        chosen = there if folds is None else tuple(folds)
        if missing := set(chosen) - set(there):
            raise MomentsError(f"the {split} split has no fold {min(missing)}; it has {', '.join(map(str, there)) or 'none'}")
        keys = [f"{split}.ordinary.{fold}" for fold in chosen]
        keys += [f"{split}.excluded"] if tokens == "all" and f"{split}.excluded" in self.rows else []
        blocks = Moments.of_pairs(self.pairs if pairs is None else pairs, 0).blocks
        found = [self._part(key, blocks) for key in keys]
        if not found:
            raise MomentsError(f"there are no {tokens} tokens in the {split} split")
        return functools.reduce(Moments.merge, found)

    def _part(self, key: str, blocks: Sequence[Pair]) -> Moments:
        if key in self._open:
            return self._open[key].select(blocks)
        whole, part = Moments.of_pairs(self.pairs, 0), Moments(blocks, self.d_model, self.device)
        wanted = [whole._block(*block) for block in part.blocks]
        tensors, metadata = read_artifact(self._file(key), PART, {"scatter": wanted})
        self._check_label(key, metadata)
        sites = [whole._site(site) for site in part.sites]
        try:
            part._take(key, self._closed[key], {"mean": tensors["mean"][:, sites], "scatter": tensors["scatter"]})
        except (KeyError, IndexError) as error:
            raise MomentsError(f"{self._file(key)} lacks some of its tensors ({error})") from None
        return part

    def _check_label(self, key: str, metadata: Mapping[str, Any]) -> None:
        label = self._label(key, self._closed[key])
        if {name: metadata.get(name) for name in label} != label:
            raise MomentsError(f"{self._file(key)} belongs to other moments: accumulate again into a new folder")

    # ---- storage -------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON of everything that is not in files of its own."""
        parts = self._open | {"shuffled": self.shuffled}
        tensors = {f"{key}.mean": moments.mean for key, moments in parts.items()}
        tensors |= {f"{key}.scatter": moments.scatter for key, moments in parts.items()}
        metadata = {
            "pairs": [[source.key, target.key] for source, target in self.pairs],
            "d_model": self.d_model,
            "rows": {key: moments.n for key, moments in parts.items()},
            "files": dict(self._closed),
        }
        return tensors, metadata

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over a stored state of the same pairs and width.

        Raises:
            MomentsError: It does not fit, or a file of a part belongs to other moments.
            FileFormatError: A file of a part is missing or damaged.
        """
        fresh = TransportMoments(self.pairs, self.d_model, self.device, self.folder)
        if metadata.get("pairs") != fresh.state()[1]["pairs"] or metadata.get("d_model") != self.d_model:
            raise MomentsError("the stored moments are of other pairs or another width")
        rows, files = metadata.get("rows"), metadata.get("files")
        if not isinstance(rows, dict) or set(tensors) != {f"{key}.{part}" for key in rows for part in ("mean", "scatter")}:
            raise MomentsError("the stored moments lack some of their tensors")
        if not isinstance(files, dict) or any(key in rows or not _PART_NAME.fullmatch(key) for key in files):
            raise MomentsError("the stored moments do not say which of their parts lie in files")
        for key, n in rows.items():
            moments = fresh.shuffled if key == "shuffled" else fresh._opened(key)
            moments._take(key, n, {part: tensors[f"{key}.{part}"] for part in ("mean", "scatter")})
        fresh._closed = dict(files)
        for key in files:
            fresh._check_label(key, read_metadata(fresh._file(key), PART))
        self._open, self._closed, self.shuffled = fresh._open, fresh._closed, fresh.shuffled


_PART_NAME = re.compile(r"(train|validation|test)\.(ordinary\.\d{1,6}|excluded)")
