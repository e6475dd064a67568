"""Sparse codes of residuals: what a sparse autoencoder computes, on torch alone, as a plain class that nnsight can ship to a server."""

from __future__ import annotations

from typing import Any

import torch

from nnato.errors import DictionaryError

CELLS = 1 << 24
"""Pre-activations held at once: rows are encoded in portions."""


class SparseCoder:
    """A sparse autoencoder in the form in which it acts, all float32; `Dictionary` adds where it belongs.

    Attributes:
        kind: How a latent's activation follows from its pre-activation p: `relu` (p if p > 0), `jumprelu` (p if p > threshold), `topk`
            (the k largest of a token, if positive), `gated` (gain · (p - b_enc) + magnitude_bias if that and p are positive).
        W_enc: (d_model, latents).
        b_enc: (latents,).
        W_dec: (latents, d_model).
        b_dec: (d_model,).
        shift: Subtracted from the (scaled) input before encoding, (d_model,): b_dec, or zero.
        scaling: What it does to each input by itself: `none`, `layer_norm`, `constant_norm_rescale`.
        threshold: (latents,), of `jumprelu`.
        gain: (latents,), of `gated`.
        magnitude_bias: (latents,), of `gated`.
        k: Of `topk`.
    """

    kind: str
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    shift: torch.Tensor
    scaling: str
    threshold: torch.Tensor | None
    gain: torch.Tensor | None
    magnitude_bias: torch.Tensor | None
    k: int | None

    def __str__(self) -> str:
        return f"a {self.kind} dictionary"

    @property
    def d_model(self) -> int:
        """Width of the residuals it encodes."""
        return self.W_enc.shape[0]

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def plain(self, device: torch.device | str) -> SparseCoder:
        """The same on a device, without what only a `Dictionary` has: this travels to a server."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _ACTS}
        made = SparseCoder()
        for name, value in found.items():
            setattr(made, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        return made

    # ---- encoding ------------------------------------------------------------------------------------------------------

    def pre_activations(self, x: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        """What decides whether a latent is active.

        Args:
            x: Float (…, d_model).
            latents: int64 (chosen,); all by default.

        Returns:
            float32 (…, latents or chosen).

        Raises:
            DictionaryError: x has another width.
        """
        self._check_width(x)
        centred = self._scaled(x.float())[0] - self.shift
        if latents is None:
            return torch.nn.functional.linear(centred, self.W_enc.T, self.b_enc)
        return torch.nn.functional.linear(centred, self.W_enc[:, latents].T, self.b_enc[latents])

    def encode(self, x: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Activations, dense.

        Args:
            x: Float (…, d_model).
            latents: int64 (chosen,): only these are computed, except for `topk`, where all of them compete; all by default.

        Returns:
            float32 (…, latents or chosen), not negative.

        Raises:
            DictionaryError: x has another width.
        """
        if self.kind != "topk":
            return self.activations(self.pre_activations(x, latents), latents)
        every = self.activations(self.pre_activations(x))
        return every if latents is None else every[..., latents]

    def encode_sparse(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations of a `topk` dictionary as values, float32 (…, k), and latents, int64 (…, k); a value may be zero.

        Raises:
            DictionaryError: It is of another kind, or x has another width.
        """
        if self.k is None:
            raise DictionaryError(f"{self} is of kind {self.kind}: only topk has a fixed number of active latents")
        values, latents = torch.topk(self.pre_activations(x), self.k, dim=-1, sorted=False)
        return values.relu(), latents

    def activations(self, pre: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        """The non-linearity alone, on what `pre_activations` returned for the same latents (of `topk`: for all of them)."""

        def of(vector: torch.Tensor | None) -> torch.Tensor:
            if vector is None:
                raise DictionaryError(f"{self} lacks a weight of its kind")
            return vector if latents is None else vector[latents]

        if self.kind == "relu":
            return pre.relu()
        if self.kind == "jumprelu":
            return pre.relu() * (pre > of(self.threshold))
        if self.kind == "gated":
            magnitude = (pre - of(self.b_enc)) * of(self.gain) + of(self.magnitude_bias)
            return magnitude.relu() * (pre > 0)
        values, chosen = torch.topk(pre, self.k or 0, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, chosen, values.relu())

    def bars(self, pre: torch.Tensor) -> torch.Tensor:
        """What pre-activations have to exceed for their latent to be active.

        Args:
            pre: What `pre_activations` returned for all latents, float32 (…, latents).

        Returns:
            float32: (latents,), or of `topk`, where latents compete, (…, 1).
        """
        if self.kind == "topk":
            k = self.k or 0
            least = torch.topk(pre, k + 1, dim=-1).values[..., -1:] if k < self.latents else torch.zeros_like(pre[..., :1])
            return least.clamp(min=0)
        if self.kind == "jumprelu" and self.threshold is not None:
            return self.threshold.clamp(min=0)
        if self.kind == "gated" and self.gain is not None and self.magnitude_bias is not None:
            return (self.b_enc - self.magnitude_bias / self.gain).clamp(min=0)
        return torch.zeros_like(self.b_enc)

    def magnitudes(self, pre: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Activations of active latents from their pre-activations.

        Args:
            pre: Float (…,), each above its bar.
            latents: int64, of the same shape: which latent each is of.
        """
        if self.gain is None or self.magnitude_bias is None:
            return pre
        return (pre - self.b_enc[latents]) * self.gain[latents] + self.magnitude_bias[latents]

    def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse codes of any kind of dictionary, computed in portions.

        Args:
            x: Float (…, d_model).

        Returns:
            Activations, float32 (…, k), some of which may be zero, and their latents, int64 (…, k). k is that of a TopK dictionary, for
            others the largest number of active latents.
        """
        rows = x.reshape(-1, x.shape[-1])
        values, latents = [], []
        for part in torch.split(rows, max(CELLS // self.latents, 1)):
            found = self.encode_sparse(part) if self.kind == "topk" else _sparse(self.encode(part))
            values.append(found[0])
            latents.append(found[1])
        width = max((one.shape[1] for one in values), default=1)
        shape = (*x.shape[:-1], width)
        return (
            torch.cat([_padded(one, width) for one in values]).reshape(shape),
            torch.cat([_padded(one, width) for one in latents]).reshape(shape),
        )

    # ---- decoding ------------------------------------------------------------------------------------------------------

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruct residuals.

        Args:
            activations: Float (…, latents).
            x: The residuals they come from, float (…, d_model): a dictionary that scales its input takes mean and scale from them.

        Returns:
            float32 (…, d_model).

        Raises:
            DictionaryError: It scales its input, and x is missing.
        """
        return self._unscaled(activations.float() @ self.W_dec + self.b_dec, x)

    def decode_sparse(
        self, values: torch.Tensor, latents: torch.Tensor, x: torch.Tensor | None = None, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `decode`, from values and latents as `encode_sparse` gives them, float and int64 (…, k).

        Where tokens have different numbers of active latents, values and latents are flat, and `starts` says where each token's begin,
        int64 (rows,).
        """
        if starts is not None:
            bags = torch.nn.functional.embedding_bag(latents, self.W_dec, starts, per_sample_weights=values.float(), mode="sum")
            return self._unscaled(bags + self.b_dec, x)
        flat = values.float().reshape(-1, values.shape[-1])
        summed = torch.nn.functional.embedding_bag(latents.reshape(flat.shape), self.W_dec, per_sample_weights=flat, mode="sum")
        return self._unscaled(summed.reshape(*values.shape[:-1], self.d_model) + self.b_dec, x)

    def contributions(self, values: torch.Tensor, latents: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What single latents add to reconstructions.

        Args:
            values: Their activations, float (n,).
            latents: Which latent of each, int64 (n,).
            x: The residuals they come from, float (n, d_model): a dictionary that scales its input takes the scale from them.

        Returns:
            float32 (n, d_model).
        """
        self._check_width(x)
        return values.float()[:, None] * self.W_dec[latents] * self._scaled(x.float())[2]

    def _unscaled(self, decoded: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        if self.scaling == "none":
            return decoded
        if x is None:
            raise DictionaryError(f"{self} standardises its input: to decode, give the residuals too")
        self._check_width(x)
        _, mean, scale = self._scaled(x.float())
        return decoded * scale + mean

    def _scaled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The input as it is encoded, and the mean and scale that bring it back."""
        zero, one = x.new_zeros(()), x.new_ones(())
        if self.scaling == "layer_norm":
            return standardise(x)
        if self.scaling == "constant_norm_rescale":
            factor = self.d_model**0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x * factor, zero, 1 / factor
        return x, zero, one

    def _check_width(self, x: torch.Tensor) -> None:
        if x.shape[-1] != self.d_model:
            raise DictionaryError(f"{self} is for residuals of width {self.d_model}, not {x.shape[-1]}")


def standardise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each residual by itself with mean 0 and deviation 1 over its coordinates: what sae_lens calls `layer_norm`.

    Args:
        x: Float (…, d_model).

    Returns:
        Standardised residuals, like x, and the means and deviations (…, 1) that bring them back.
    """
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    deviation = centred.std(-1, keepdim=True)
    return centred / (deviation + 1e-5), mean, deviation  # sae_lens adds the constant on the way in only


_ACTS = ("kind", "W_enc", "b_enc", "W_dec", "b_dec", "shift", "scaling", "threshold", "gain", "magnitude_bias", "k")


def _sparse(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest activations of each row, as many as the busiest row has."""
    width = max(int((dense > 0).sum(-1).max()) if len(dense) else 1, 1)
    values, latents = torch.topk(dense, width, dim=-1, sorted=False)
    return values, latents


def _padded(found: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(found, (0, width - found.shape[1]))
