"""Moments of (source, target) pairs by split, fold and token class: what operators are fitted, chosen and judged by."""

from __future__ import annotations

import functools
import os
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

KIND = "moments-part"


class TransportMoments:
    """Everything operators of some pairs are fitted, chosen and judged by: moments per fold and token class, and of shuffled pairs.

    Parts are named `train.ordinary.0` (split, token class, fold), `train.excluded` (all folds) and `shuffled` (all of train). What is
    excluded or shuffled is first added up per fold (`train.excluded.0`, `shuffled.0`), so that a fold that was added up elsewhere gives the
    same bits. With a folder, only parts that are being added to are held in memory; one that is complete goes to a file there,
    `{name}.safetensors`, and what is asked of it later is read from that file.

    Attributes:
        pairs: The (source, target) pairs.
        sites: Their sites, sorted.
        d_model: Width of the residual stream.
        products: dtype in which ordinary and shuffled tokens are multiplied, as in `Moments`. Excluded ones, which may be huge, always take
            float64.
        null: Whether shuffled pairs are added up, too.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        d_model: int,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        products: torch.dtype = torch.float64,
        null: bool = True,
    ) -> None:
        if products != torch.float64 and torch.get_float32_matmul_precision() != "highest":
            raise MomentsError('products in float32 need torch.set_float32_matmul_precision("highest"): fewer digits are not enough')
        self.pairs = tuple(sorted(set(pairs)))
        self.d_model = d_model
        self.device = torch.device(device)
        self.folder = folder
        self.products = products
        self.null = null
        self.sites = Moments(self.pairs, 0).sites
        self._open: dict[str, Moments] = {}
        self._closed: dict[str, int] = {}

    @staticmethod
    def bytes_for(pairs: Iterable[Pair], d_model: int, folds: int, null: bool = True) -> tuple[int, int]:
        """Size of the sums of these pairs, with or without their null: in all, and of the parts that are added to at one time."""
        pairs = set(pairs)
        own = {site for pair in pairs for site in pair}
        part, shuffled = 8 * d_model**2 * (len(pairs) + len(own)), 8 * d_model**2 * len(pairs) * null
        ordinary = len(FOLDED) * folds + len(SPLITS) - len(FOLDED)
        # At the end the last fold's excluded tokens are still apart; at one time, the shuffled pairs of a fold too.
        return (ordinary + len(SPLITS) + 1) * part + shuffled, 3 * part + 2 * shuffled

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows of each part."""
        return self._closed | {key: part.n for key, part in self._open.items()}

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
        ordinary, excluded, shuffled = self._enter(batch.split, batch.fold)
        null = self._opened(shuffled) if self.null and batch.split == "train" else None
        parts = self._opened(ordinary), self._opened(excluded), null
        add_batch(batch.residuals, batch.ordinary, batch.excluded, batch.documents, *parts)

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
        parts = zip(self._enter(split, fold), (ordinary, excluded, shuffled), strict=True)
        self._open |= {name: self._opened(name).merge(part) for name, part in parts if part is not None}

    def _enter(self, split: str, fold: int) -> tuple[str, str, str]:
        """Make a fold the one that is added to, so that what was added to another is complete; the names of its parts.

        Complete parts go to their files. A checkpoint that names such a file is written later, so it always exists.
        """
        names = (f"{split}.ordinary.{fold}", f"{split}.excluded.{fold}", f"shuffled.{fold}")
        for key in [key for key in self._open if key not in names]:
            if (total := total_of(key)) != key:
                self._open[total] = self._opened(total).merge(self._open.pop(key))
        for key in [key for key in self._open if key not in (*names, f"{split}.excluded", "shuffled")] if self.folder else ():
            self.put(key, self._open.pop(key))
        return names

    def put(self, key: str, part: Moments) -> None:
        """Put a part that is complete into its file."""
        write_artifact(self._file(key), KIND, {"mean": part.mean, "scatter": part.scatter}, self._label(key, part.n))
        self._closed[key] = part.n

    def close(self) -> None:
        """Put every part into its file: nothing more is added, and each can be read alone."""
        for key in list(self._open):
            self.put(key, self._open.pop(key))

    def _opened(self, key: str) -> Moments:
        if key in self._closed:
            raise MomentsError(f"part {key} of the moments is complete: the batches of a fold must come in a row")
        if key not in self._open:
            self._open[key] = self._empty(key)
        return self._open[key]

    def _empty(self, key: str) -> Moments:
        if key.startswith("shuffled"):
            return Moments(self.pairs, self.d_model, self.device, self.products)
        products = self.products if ".ordinary." in key else torch.float64
        return Moments.of_pairs(self.pairs, self.d_model, self.device, products)

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
        return any(".excluded" in key for key in self.rows)

    @property
    def shuffled(self) -> Moments:
        """Cross moments of ordinary training tokens at the source with tokens of *another document* at the same position of the target.

        What is left of a pair when only position is shared (METHODS: shuffled-pair null).
        """
        parts = [part for key, part in sorted(self._open.items()) if key.startswith("shuffled")]
        return functools.reduce(Moments.merge, parts, self._empty("shuffled"))

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
        keys += sorted(key for key in self.rows if tokens == "all" and key.startswith(f"{split}.excluded"))
        blocks = Moments.of_pairs(self.pairs if pairs is None else pairs, 0).blocks
        found = [self._part(key, blocks) for key in keys]
        if not found:
            raise MomentsError(f"there are no {tokens} tokens in the {split} split")
        return functools.reduce(Moments.merge, found)

    def whole_part(self, key: str) -> Moments:
        """A part that lies in a file, as it is there.

        Raises:
            MomentsError: It belongs to other moments, or lacks something.
            FileFormatError: The file is missing or damaged.
        """
        tensors, metadata = read_artifact(self._file(key), KIND)
        self._check_label(key, metadata)
        if set(tensors) != {"mean", "scatter"}:
            raise MomentsError(f"{self._file(key)} lacks some of its tensors")
        part = self._empty(key)
        part._take(key, self._closed[key], tensors)
        return part

    def _part(self, key: str, blocks: Sequence[Pair]) -> Moments:
        if key in self._open:
            return self._open[key].select(blocks)
        whole, part = Moments.of_pairs(self.pairs, 0), Moments(blocks, self.d_model, self.device)
        wanted = [whole._block(*block) for block in part.blocks]
        tensors, metadata = read_artifact(self._file(key), KIND, {"scatter": wanted})
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
        tensors = {f"{key}.mean": moments.mean for key, moments in self._open.items()}
        tensors |= {f"{key}.scatter": moments.scatter for key, moments in self._open.items()}
        metadata = {
            "pairs": [[source.key, target.key] for source, target in self.pairs],
            "d_model": self.d_model,
            "rows": {key: moments.n for key, moments in self._open.items()},
            "files": dict(self._closed),
        }
        return tensors, metadata

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over a stored state of the same pairs and width.

        Raises:
            MomentsError: It does not fit, or a file of a part belongs to other moments.
            FileFormatError: A file of a part is missing or damaged.
        """
        fresh = TransportMoments(self.pairs, self.d_model, self.device, self.folder, self.products)
        if metadata.get("pairs") != fresh.state()[1]["pairs"] or metadata.get("d_model") != self.d_model:
            raise MomentsError("the stored moments are of other pairs or another width")
        rows, files = metadata.get("rows"), metadata.get("files")
        if not isinstance(rows, dict) or set(tensors) != {f"{key}.{part}" for key in rows for part in ("mean", "scatter")}:
            raise MomentsError("the stored moments lack some of their tensors")
        if not isinstance(files, dict) or set(files) & set(rows) or not all(_PART.fullmatch(key) for key in (*files, *rows)):
            raise MomentsError("the stored moments do not say which of their parts lie in files")
        for key, n in rows.items():
            fresh._opened(key)._take(key, n, {part: tensors[f"{key}.{part}"] for part in ("mean", "scatter")})
        fresh._closed = dict(files)
        for key in files:
            fresh._check_label(key, read_metadata(fresh._file(key), KIND))
        self._open, self._closed = fresh._open, fresh._closed


_PART = re.compile(r"(train|validation|test)\.(ordinary\.\d{1,6}|excluded(\.\d{1,6})?)|shuffled(\.\d{1,6})?")


def total_of(key: str) -> str:
    """Name of the part to which a part is added when its fold is complete; a fold of ordinary tokens stays apart."""
    total, _, _ = key.rpartition(".")
    return total if total == "shuffled" or total.endswith(".excluded") else key


def check_memory(needed: int, device: torch.device) -> None:
    """Refuse sums that will not fit into memory.

    Args:
        needed: Bytes.
        device: Where they will be.

    Raises:
        MomentsError: There is too little.
    """
    gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.9 * available:
        raise MomentsError(
            f"the moments of these pairs take {needed / 1e9:.1f} GB of memory, and {device} has {available / 1e9:.1f} GB: ask for fewer "
            "sites or pairs" + (', or keep the sums on device "cpu"' if gpu else "")
        )
