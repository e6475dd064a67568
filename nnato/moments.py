"""Streaming moments of residuals: count, means and centred cross-products, in float64. No activation is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nnato.errors import ActivationError, MomentsError
from nnato.sites import Pair, ResidualSite

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
        scatter: float64 (blocks, d_model, d_model); of a site's own block only the upper triangle counts. `scatter_of` reads it.
        products: dtype in which centred rows are multiplied, float64 by default. float32 halves the time and still adds up in float64;
            scatters are then exact to about 1e-7 of the product of the two standard deviations, so keep huge tokens out.
    """

    def __init__(
        self,
        blocks: Iterable[Pair],
        d_model: int,
        device: torch.device | str = "cpu",
        products: torch.dtype = torch.float64,
    ) -> None:
        self.blocks: tuple[Pair, ...] = tuple(sorted(set(blocks)))
        self.sites: tuple[ResidualSite, ...] = tuple(sorted({site for block in self.blocks for site in block}))
        self.d_model = d_model
        self.products = products
        self.n = 0
        self.mean = torch.zeros(2, len(self.sites), d_model, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(len(self.blocks), d_model, d_model, dtype=torch.float64, device=device)
        self._interrupted = False

    @classmethod
    def of_pairs(
        cls,
        pairs: Iterable[Pair],
        d_model: int,
        device: torch.device | str = "cpu",
        products: torch.dtype = torch.float64,
    ) -> Moments:
        """Empty moments with all that these pairs need: their cross blocks and their sites' own."""
        pairs = tuple(pairs)
        own = {(site, site) for pair in pairs for site in pair}
        return cls(own | set(pairs), d_model, device, products)

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
        x, y = x.to(self.products), y.to(self.products)
        place = {site: i for i, site in enumerate(self.sites)}
        # The one write of many steps: should an interrupt fall into it, the state says so instead of being silently wrong.
        self._interrupted = True
        for block, (source, target) in enumerate(self.blocks):
            _add_products(self.scatter[block], x[place[source]], y[place[target]], source == target)
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
        for number in range(len(self.blocks)):
            merged.scatter[number] = self._read_block(number) + other._read_block(number).to(self.scatter.device)
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
            for number in range(len(self.blocks)):
                rest.scatter[number] = self._read_block(number) - part._read_block(number).to(self.scatter.device)
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
        return self._read_block(self._block(target, source)).T if source > target else self._read_block(self._block(source, target))

    def _read_block(self, number: int) -> torch.Tensor:
        """A block; of a site's own, which is symmetric, only the upper triangle is kept up to date."""
        source, target = self.blocks[number]
        block = self.scatter[number]
        return block.triu() + block.triu(1).T if source == target else block

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


PANEL = 128
"""Columns of a site's own products made at once, from the diagonal on: nearly half of a symmetric product need not be made."""


def _add_products(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor, symmetric: bool) -> None:
    """Add `xᵀ y` in place; of a symmetric product the upper triangle, in panels.

    Args:
        total: float64 (d, d).
        x: (n, d), in the dtype to multiply in.
        y: The same.
        symmetric: Whether x is y.
    """
    width = len(total)
    step = PANEL if symmetric else width
    for first in range(0, width, step):
        panel, rest = slice(first, first + step), slice(first if symmetric else 0, width)
        if x.dtype == total.dtype:
            total[panel, rest].addmm_(x[:, panel].T, y[:, rest])
        else:
            with torch.autocast(total.device.type, enabled=False):  # which would multiply in bfloat16
                total[panel, rest] += x[:, panel].T @ y[:, rest]


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


def pack(moments: Moments) -> dict[str, Any]:
    """Moments as plain data for the way back from a server: a site's own scatter, being symmetric, as its upper triangle."""
    upper = torch.triu_indices(moments.d_model, moments.d_model, device=moments.scatter.device)
    own = [number for number, (source, target) in enumerate(moments.blocks) if source == target]
    cross = [number for number, (source, target) in enumerate(moments.blocks) if source != target]
    symmetric = [moments._read_block(number)[upper[0], upper[1]] for number in own]
    return {
        "n": moments.n,
        "mean": moments.mean.cpu(),
        "own": torch.stack(symmetric).cpu() if own else torch.zeros(0, upper.shape[1], dtype=torch.float64),
        "cross": moments.scatter[cross].cpu(),
    }


def unpack(packed: Mapping[str, Any], empty: Moments) -> Moments:
    """Fill empty moments with what `pack` made of others like them.

    Raises:
        MomentsError: The data are not of such moments, or not finite.
    """
    try:
        upper = torch.triu_indices(empty.d_model, empty.d_model)
        own = [number for number, (source, target) in enumerate(empty.blocks) if source == target]
        cross = [number for number, (source, target) in enumerate(empty.blocks) if source != target]
        scatter = torch.empty(len(empty.blocks), empty.d_model, empty.d_model, dtype=torch.float64)
        for number, triangle in zip(own, packed["own"], strict=True):
            scatter[number][upper[0], upper[1]] = triangle
            scatter[number][upper[1], upper[0]] = triangle
        for number, block in zip(cross, packed["cross"], strict=True):
            scatter[number] = block
        empty._take("answer", packed["n"], {"mean": packed["mean"], "scatter": scatter})
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise MomentsError(f"the answer does not hold the moments that were asked for ({type(error).__name__}: {error})") from None
    return empty
