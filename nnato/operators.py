"""Transport operators: frozen affine maps from the residual at one site to the residual at a later one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnato.errors import FileFormatError, OperatorError, SiteError
from nnato.linalg import random_orthogonal
from nnato.notebook import html_table
from nnato.regression import Regression
from nnato.sites import Pair, ResidualSite, make_pair
from nnato.storage import read_artifact, require, require_entries, require_finite, write_artifact

KIND = "operator"
_TENSORS = ("weight", "source_mean", "target_mean")


class AffineMap:
    """`ŷ = ȳ + (x - x̄) W`: what a transport operator does to a residual, as a plain class that nnsight can ship to a server.

    Attributes:
        source: Where it reads.
        target: Where it predicts.
        weight: float64 (d_x, d_y), acting on row vectors: the transpose of scikit-learn's `coef_`.
        source_mean: x̄, float64 (d_x,).
        target_mean: ȳ, float64 (d_y,).
    """

    source: ResidualSite
    target: ResidualSite
    weight: torch.Tensor
    source_mean: torch.Tensor
    target_mean: torch.Tensor

    @staticmethod
    def make(
        source: ResidualSite, target: ResidualSite, weight: torch.Tensor, source_mean: torch.Tensor, target_mean: torch.Tensor
    ) -> AffineMap:
        """A map of these tensors between these sites."""
        made = AffineMap()
        made.source, made.target = source, target
        made.weight, made.source_mean, made.target_mean = weight, source_mean, target_mean
        return made

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Predict.

        Args:
            x: Float (…, d_x).

        Returns:
            (…, d_y) in the dtype of x and on its device; computed in float32 at least.

        Raises:
            OperatorError: x has another width.
        """
        if x.shape[-1] != self.weight.shape[0]:
            raise OperatorError(f"this operator takes residuals of width {self.weight.shape[0]}, not {x.shape[-1]}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Centred first: one coordinate can be thousands of times larger than the rest, and float32 would lose them in xW.
        centred = x.to(dtype) - self.source_mean.to(x.device, dtype)
        predicted = centred @ self.weight.to(x.device, dtype) + self.target_mean.to(x.device, dtype)
        return predicted.to(x.dtype)


@dataclass(frozen=True)
class TransportOperator(AffineMap):
    """An affine map `ŷ = ȳ + (x - x̄) W` from the residual at `source` to the residual at `target` (arXiv 2508.17540).

    Baselines are operators too, so that everything that can be done to a fitted map can be done to them.

    Attributes:
        source: Where it reads.
        target: Where it predicts.
        weight: float64 (d_x, d_y), acting on row vectors: the transpose of scikit-learn's `coef_`.
        source_mean: x̄, float64 (d_x,), mean of the training tokens at the source.
        target_mean: ȳ, float64 (d_y,), at the target.
        name: What kind of map it is: `transport`, `composed`, or a baseline: `mean`, `identity`, `identity_shift`, `identity_scaled`,
            `random_orthogonal`, `shuffled`, `zero`, `null_input`.
        details: Where it comes from, in JSON: penalty, model, text, token counts, versions.
    """

    source: ResidualSite
    target: ResidualSite
    weight: torch.Tensor = field(repr=False)
    source_mean: torch.Tensor = field(repr=False)
    target_mean: torch.Tensor = field(repr=False)
    name: str = "transport"
    details: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.source >= self.target:
            raise SiteError(f"operator {self.source}:{self.target}: the source must come before the target")
        shapes = [tuple(tensor.shape) for tensor in (self.weight, self.source_mean, self.target_mean)]
        if len(shapes[0]) != 2 or (shapes[1], shapes[2]) != (shapes[0][:1], shapes[0][1:]):
            raise OperatorError(
                f"operator {self.source}:{self.target}: weight, source mean and target mean have shapes {shapes}, "
                "not (d_x, d_y), (d_x,) and (d_y,)"
            )

    def _repr_html_(self) -> str:
        rows: list[tuple[str, Any]] = [("shape of W", " × ".join(map(str, self.weight.shape))), ("‖W‖", float(self.weight.norm()))]
        rows += [(f"R² on test, {metric}", float(value)) for metric, value in self.details.get("r2", {}).items()]
        rows += [(key.replace("_", " "), self.details[key]) for key in ("kappa", "training_tokens") if key in self.details]
        rows += [(key, self.details[key].get(name)) for key, name in (("model", "name"), ("text", "source")) if key in self.details]
        return html_table(f"{self.name} {self.source} → {self.target}", ("operator", ""), rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # A trace that goes to a server takes along what it uses, by value: the map only, not this class with its files and versions.
        return AffineMap.make, (self.source, self.target, self.weight, self.source_mean, self.target_mean)

    def __copy__(self) -> TransportOperator:
        return self  # frozen

    def __deepcopy__(self, memo: Any) -> TransportOperator:
        return self  # frozen

    @property
    def bias(self) -> torch.Tensor:
        """`b = ȳ - x̄W` of the form `ŷ = xW + b`: the prediction for x = 0; float64 (d_y,)."""
        return self.target_mean - self.source_mean @ self.weight

    @property
    def pair(self) -> Pair:
        """(source, target)."""
        return self.source, self.target

    def save(self, path: str | Path) -> Path:
        """Write to one `.safetensors` file, atomically.

        Raises:
            OutputError: It cannot be written.
        """
        path = Path(path).expanduser()
        metadata = {"source": self.source.key, "target": self.target.key, "name": self.name, "details": self.details}
        write_artifact(path, KIND, {name: getattr(self, name) for name in _TENSORS}, metadata)
        return path

    @staticmethod
    def load(path: str | Path) -> TransportOperator:
        """Read what `save` wrote. Executes nothing.

        Raises:
            FileFormatError: No such file, or not a readable operator.
        """
        path = Path(path).expanduser()
        tensors, metadata = read_artifact(path, KIND)
        require(set(tensors) == set(_TENSORS), path, f"it holds the tensors {sorted(tensors)}")
        require_finite(tensors, path)
        require({"source", "target"} <= set(metadata), path, "source or target is missing")
        require_entries(metadata, path, name=str, details=dict)
        try:
            source, target = make_pair(metadata["source"], metadata["target"])
            return TransportOperator(source, target, **tensors, name=metadata["name"], details=metadata["details"])
        except (SiteError, OperatorError) as error:
            raise FileFormatError(f"{path} is inconsistent: {error}; make it again") from None


def constant(pair: Pair, value: torch.Tensor, name: str) -> TransportOperator:
    """`ŷ = value` whatever x is; float64 (d_model,)."""
    nothing = value.new_zeros(1, 1).expand(len(value), len(value))  # one number in memory, and on the way to a server
    return TransportOperator(*pair, nothing, torch.zeros_like(value), value, name)


def identity(pair: Pair, source_mean: torch.Tensor, target_mean: torch.Tensor, name: str = "identity_shift") -> TransportOperator:
    """`ŷ = x + target_mean - source_mean`: what the skip connection gives for free; means float64 (d_model,)."""
    eye = torch.eye(len(source_mean), dtype=torch.float64, device=source_mean.device)
    return TransportOperator(*pair, eye, source_mean, target_mean, name)


def scaled_identity(pair: Pair, train: Regression) -> TransportOperator:
    """`ŷ = ȳ + s (x - x̄)` with the best scalar s: the skip connection, if the stream only grows or shrinks."""
    scale = train.xy.trace() / train.xx.trace()
    eye = torch.eye(len(train.x_mean), dtype=torch.float64, device=train.xx.device)
    return TransportOperator(*pair, scale * eye, train.x_mean, train.y_mean, "identity_scaled")


def random_rotation(pair: Pair, source_mean: torch.Tensor, target_mean: torch.Tensor, seed: int = 0) -> TransportOperator:
    """`ŷ = ȳ + (x - x̄) O` with a random orthogonal O: as much variance as the identity, in the wrong directions."""
    rotation = random_orthogonal(len(source_mean), seed, source_mean.device)
    return TransportOperator(*pair, rotation, source_mean, target_mean, "random_orthogonal", {"seed": seed})


def baselines(pair: Pair, source_mean: torch.Tensor, target_mean: torch.Tensor) -> dict[str, TransportOperator]:
    """Maps that need only the means: `mean`, `identity` (`ŷ = x`) and `identity_shift` (`ŷ = x + ȳ - x̄`; METHODS §4.7).

    Args:
        pair: (source, target).
        source_mean: Mean of the training tokens at the source, float64 (d_model,).
        target_mean: At the target.
    """
    zero = torch.zeros_like(source_mean)
    return {
        "mean": constant(pair, target_mean, "mean"),
        "identity": identity(pair, zero, zero, "identity"),
        "identity_shift": identity(pair, source_mean, target_mean),
    }


def compose(first: TransportOperator, second: TransportOperator) -> TransportOperator:
    """The map from the source of the first to the target of the second, by way of the site between them: `second(first(x))`.

    Raises:
        OperatorError: The first does not end where the second begins.
    """
    if first.target != second.source:
        raise OperatorError(
            f"operators {first.source}:{first.target} and {second.source}:{second.target} cannot be composed: the first has to end "
            "where the second begins"
        )
    target_mean = second.target_mean + (first.target_mean - second.source_mean) @ second.weight
    details = {"through": first.target.key}
    return TransportOperator(first.source, second.target, first.weight @ second.weight, first.source_mean, target_mean, "composed", details)
