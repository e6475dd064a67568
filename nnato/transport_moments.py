"""Moments of (source, target) pairs by split, fold and token class: what operators are fitted, chosen and judged by."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nnato.corpus import FOLDED, SPLITS
from nnato.errors import MomentsError
from nnato.moments import Moments, add_batch
from nnato.sites import Pair
from nnato.statistics import ResidualBatch
from nnato.storage import read_artifact, read_metadata, write_artifact

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
