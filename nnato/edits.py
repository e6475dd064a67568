"""Edits: which replacement of a residual, at which sites and positions. An edit is data; `losses` carries it out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nnato.errors import FileFormatError, OperatorError, first_line
from nnato.losses import Way
from nnato.lowrank import truncated
from nnato.operators import TransportOperator, baselines, constant, random_rotation
from nnato.sites import Pair

INTERVENTIONS = {
    "transport": "the operator's prediction from the source residual",
    "identity": "the source residual as it is",
    "identity_shift": "the source residual moved by the difference of means",
    "mean": "the mean residual of training tokens at the target",
    "zero": "zero",
    "null_input": "the operator's prediction for a zero residual (the paper's ablation)",
    "resample": "the target residual of another document at the same position",
    "random_orthogonal": "the source residual about its mean, turned at random, about the target's mean",
    "rotated": "the operator's prediction, turned at random about the target's mean",
    "moved_error": "the target residual plus the operator's error at another token of the sequence",
    "features": "the operator's prediction within the span of chosen directions, the target residual elsewhere",
    "steer": "the target residual plus a vector",
    "lts": "the operator's prediction within the transport subspace, the target residual elsewhere",
    "lts_complement": "the target residual within the transport subspace, the operator's prediction elsewhere",
    "shuffled": "the prediction of an operator fitted to unrelated documents",
    "shrunk_to_identity": "the prediction of a ridge that large penalties leave the identity",
}
"""What each intervention puts in the place of the target residual. Besides, `rank_R` is the prediction of an operator of rank R, and every
operator given as a control is an intervention by its own name."""

DEFAULT_INTERVENTIONS = ("transport", "identity", "mean", "zero", "null_input")
FITTED_CONTROLS = ("shuffled", "shrunk_to_identity")
SUBSPACE = ("lts", "lts_complement")


@dataclass(frozen=True)
class Supplies:
    """What interventions need besides the operator.

    Attributes:
        controls: Further operators, by pair and intervention.
        features: Directions at the target, float (directions, d_model).
        steering: A vector to add, float (d_model,).
        subspaces: Of some pairs, factors (d_model, r) and (r, d_model) of the projector onto the transport subspace.
        seed: Of random rotations.
    """

    controls: Mapping[Pair, Mapping[str, TransportOperator]] = field(default_factory=dict)
    features: torch.Tensor | None = None
    steering: torch.Tensor | None = None
    subspaces: Mapping[Pair, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    seed: int = 0


def intervention(name: str, operator: TransportOperator, supplies: Supplies | None = None) -> Way:
    """How an intervention makes the residual that it puts in the place of the target residual.

    Args:
        name: One of `INTERVENTIONS`, or the name of a control of the operator's pair.
        operator: The fitted operator of the pair.
        supplies: What else it needs.

    Raises:
        OperatorError: The intervention is unknown, or what it needs is missing or does not fit.
    """
    supplies = supplies or Supplies()
    width = len(operator.target_mean)
    if name in (mine := supplies.controls.get(operator.pair, {})):
        return "map", mine[name], None, None
    if name in ("resample", "moved_error"):
        return name, None if name == "resample" else operator, None, None
    if name == "steer":
        if supplies.steering is None or tuple(supplies.steering.shape) != (width,):
            raise OperatorError(f"steer adds a vector of {width} numbers: give one")
        return "add", None, None, supplies.steering.double()
    if name == "features":
        if supplies.features is None:
            raise OperatorError("the intervention features needs directions (directions, d_model): give some")
        return "within", operator, *span(supplies.features, width)
    if name in SUBSPACE:
        if operator.pair not in supplies.subspaces:
            raise OperatorError(f"{name} needs the transport subspace of {operator.source}:{operator.target}, from moments: give those")
        return "within" if name == "lts" else "outside", operator, *supplies.subspaces[operator.pair]
    if name == "rotated":
        turn = random_rotation(operator.pair, operator.target_mean, operator.target_mean, supplies.seed).weight
        return "map", replace(operator, weight=operator.weight @ turn.to(operator.weight.device), name=name), None, None
    return "map", _map(name, operator, supplies.seed), None, None


def _map(name: str, operator: TransportOperator, seed: int) -> TransportOperator:
    """A map of the source residual that the operator alone determines."""
    means = operator.source_mean, operator.target_mean
    if name == "transport":
        return operator
    if name == "zero":
        return constant(operator.pair, torch.zeros_like(operator.target_mean), name)
    if name == "null_input":
        return constant(operator.pair, operator.bias, name)
    if name == "random_orthogonal":
        return random_rotation(operator.pair, *means, seed)
    if name in (simple := baselines(operator.pair, *means)):
        return simple[name]
    pair = f"{operator.source}:{operator.target}"
    if name in FITTED_CONTROLS or is_rank(name):
        raise OperatorError(f"{name} at {pair} is another operator, which has to be fitted: give it among the controls")
    raise OperatorError(f"unknown intervention {name!r}; known are {', '.join(INTERVENTIONS)}, rank_R, and the names of controls")


def is_rank(name: str) -> bool:
    """Whether an intervention is `rank_R`."""
    return name.startswith("rank_") and name[5:].isascii() and name[5:].isdigit()


def span(directions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the orthogonal projector onto the span of some directions, `Dᵀ(DDᵀ)⁻¹` and `D` (METHODS §7).

    Args:
        directions: D, float (directions, d_model).
        width: d_model.

    Returns:
        float64 (d_model, directions) and (directions, d_model).

    Raises:
        OperatorError: They have another width, are not finite, or are (nearly) dependent.
    """
    if directions.dim() != 2 or directions.shape[1] != width or not 0 < len(directions) <= width:
        raise OperatorError(f"directions of shape {tuple(directions.shape)}: give (directions, {width}), at most {width} of them")
    rows = directions.double()
    if not bool(torch.isfinite(rows).all()):
        raise OperatorError("directions hold values that are not finite")
    rank = int(torch.linalg.matrix_rank(rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300), rtol=1e-8))
    if rank < len(rows):
        raise OperatorError(f"{len(rows)} directions span {rank} dimensions only: leave out those that depend on others")
    return torch.linalg.pinv(rows), rows


def truncate(operator: TransportOperator, rank: int) -> TransportOperator:
    """The operator with only its largest singular values kept, as in the paper; not the best one of its rank.

    Raises:
        MomentsError: There is no such rank.
    """
    weight = truncated(operator.weight).weight(rank)
    return replace(operator, weight=weight, name=f"rank_{rank}", details={**operator.details, "rank": rank, "truncated": True})


def read_directions(path: str | Path, name: str = "directions") -> torch.Tensor:
    """Directions from a safetensors file: its tensor of this name, or its only one; float (directions, d_model).

    Raises:
        FileFormatError: No such file, not a safetensors file, or no such tensor.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if name not in names and len(names) != 1:
                raise FileFormatError(f"{path} holds the tensors {names}: call the one to use {name!r}")
            found: torch.Tensor = file.get_tensor(name if name in names else names[0])
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path} is damaged or not a safetensors file ({first_line(error)}); make it again") from None
    if not found.is_floating_point() or found.dim() not in (1, 2):
        raise FileFormatError(f"{path}: the tensor has shape {tuple(found.shape)} and dtype {found.dtype}, not float (directions, d_model)")
    return found if found.dim() == 2 else found[None]


@dataclass(frozen=True)
class EditRecord:
    """One edit as data: what was put where. It is stored with its effect, and tells whether two results are of the same edit.

    Attributes:
        intervention: Its name.
        pairs: (source, target) of each site edited in the pass, as keys.
        digest: Of the numbers that it uses (maps, means, directions), 16 hexadecimal digits for each pair.
        rank: Of the operator, where one was chosen; None for full rank.
        positions: The rule.
        seeds: Of the positions.
    """

    intervention: str
    pairs: tuple[tuple[int | str, int | str], ...]
    digest: tuple[str, ...]
    rank: int | None
    positions: str
    seeds: tuple[int, ...]

    @staticmethod
    def of(name: str, links: Sequence[tuple[Pair, Way]], positions: str, seeds: tuple[int, ...]) -> EditRecord:
        """Describe an edit of some pairs in one pass."""
        pairs = tuple((source.key, target.key) for (source, target), _ in links)
        ranks = {getattr(way[1], "details", {}).get("rank") for _, way in links} if is_rank(name) or name == "transport" else {None}
        return EditRecord(name, pairs, tuple(_digest(way) for _, way in links), min(ranks, key=str), positions, seeds)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        record = asdict(self)
        return {name: _lists(value) for name, value in record.items()}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> EditRecord:
        """What `to_json` gave.

        Raises:
            FileFormatError: It is something else.
        """
        names = {"intervention", "pairs", "digest", "rank", "positions", "seeds"}
        if set(record) != names:
            raise FileFormatError(f"an edit has the entries {', '.join(sorted(names))}, not {', '.join(sorted(record))}")
        texts, numbers, pairs = record["digest"], record["seeds"], record["pairs"]
        sound = [
            isinstance(record["intervention"], str) and isinstance(record["positions"], str),
            record["rank"] is None or type(record["rank"]) is int,
            _is_list(texts, str) and _is_list(numbers, int),
            _is_list(pairs, list) and all(len(pair) == 2 and _is_list(pair, int | str) for pair in pairs),
        ]
        if not all(sound):
            raise FileFormatError(f"an edit has an entry of another type: {str(dict(record))[:200]}")
        return EditRecord(**{**record, "digest": tuple(texts), "seeds": tuple(numbers), "pairs": tuple(tuple(pair) for pair in pairs)})


def _is_list(value: Any, of: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, of) for item in value)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _digest(way: Way) -> str:
    """A fingerprint of all numbers of a way."""
    kind, operator, left, right = way
    digest = hashlib.blake2b(kind.encode(), digest_size=8)
    tensors = [operator.weight, operator.source_mean, operator.target_mean] if isinstance(operator, TransportOperator) else []
    for tensor in [*tensors, *(part for part in (left, right) if part is not None)]:
        numbers = tensor.detach().cpu()
        few = numbers.flatten()[:1] if not any(numbers.stride()) else numbers.contiguous()  # a constant's weight is one number, repeated
        digest.update(str(tuple(tensor.shape)).encode() + few.numpy().tobytes())
    return digest.hexdigest()
