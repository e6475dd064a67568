"""Training sparse autoencoders with sae_lens on the residual stream: of one site, or of all layers together (arXiv 2409.04185).

A forward pass gives the residuals of all layers; each (token, layer) is a row. Rows are shuffled within a buffer and go to sae_lens'
`SAETrainer` step by step; no activation is stored. What a buffer holds follows from a cursor and a few rows that were left over, so a
checkpoint is small, and a run that was killed ends in the same bits as one that was not. (sae_lens' own mixing buffer keeps rows from
ever earlier passes and cannot be made anew.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from nnato.accumulation import tokenize
from nnato.checkpoints import Checkpoints
from nnato.coding import standardise
from nnato.corpus import FRACTIONS, Corpus, TokenBlocks
from nnato.dictionaries import origin
from nnato.errors import DictionaryError
from nnato.models import describe
from nnato.reduction import SINK_RATIO, TokenClasses, capture, located
from nnato.sites import ResidualSite
from nnato.statistics import NonFinite, Progress, non_finite
from nnato.storage import SCHEMA, Metadata, atomic_folder, prepare_folder, provenance, require, require_entries

if TYPE_CHECKING:
    from nnato.lens import Lens
    from nnato.nnsight_setup import TransformersModel

KIND = "sae-training"
CHECKPOINT = "checkpoint.safetensors"
SCALES = ("token", "mean", "none")
PER_DOCUMENT = 8
"""Blocks of a document in the default text, so that a few long ones do not make it up."""
LEAST_TEXT = 40_000
"""Tokens of the default text, at least."""
PROBE = 256
"""Tokens of each buffer on which the SAE is scored before it is trained on them."""


@dataclass(frozen=True)
class Recipe:
    """How an SAE is trained.

    Attributes:
        kind: `topk`, or `batchtopk` (k active latents on average; saved as JumpReLU).
        expansion: Latents for each dimension of the residual stream.
        k: Active latents.
        tokens: Ordinary tokens to train on, each with all its layers; text that is shorter is read again.
        scale: `token` standardises each residual by itself, as multi-layer SAEs do, so that all layers count alike; `mean` divides all by
            one number (their mean norm over √d, folded into the weights at the end); `none` leaves them as they are.
        rows: Rows (token, layer) of a step.
        buffer: Rows that are shuffled together.
        lr: Adam's learning rate; None for 2e-4 / √(latents / 2¹⁴). Warm-up is a tenth of the steps (at most 1000), decay the last fifth.
        aux: Weight of sae_lens' auxiliary loss by which dead latents learn the error of the others.
        dead_tokens: A latent that is not active at any layer for so many tokens is dead; None for a tenth of `tokens`, at most 10 million.
        seed: Of weights and shuffling.

    Raises:
        DictionaryError: On construction: an unknown word or a number out of range.
    """

    kind: str = "topk"
    expansion: int = 16
    k: int = 32
    tokens: int = 1_000_000
    scale: str = "token"
    rows: int = 4096
    buffer: int = 65_536
    lr: float | None = None
    aux: float = 1 / 32
    dead_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("topk", "batchtopk") or self.scale not in SCALES:
            raise DictionaryError(f"kind {self.kind!r}, scale {self.scale!r}: known are topk, batchtopk; {', '.join(SCALES)}")
        for name in ("expansion", "k", "tokens", "rows", "buffer", "dead_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DictionaryError(f"{name} {value}: give at least 1")
        if self.lr is not None and not 0 < self.lr < 1:
            raise DictionaryError(f"learning rate {self.lr}: give a number between 0 and 1")
        if self.buffer < self.rows:
            raise DictionaryError(f"a buffer of {self.buffer} rows is smaller than a step of {self.rows}")


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        path: The folder, in sae_lens' format: `load_dictionary`, or `SAE.load_from_disk` without nnato.
        sites: Where it was trained.
        history: By buffer: `tokens`, `loss`, `dead` (share of latents) and `fvu` by site, of tokens it had not been trained on in this
            pass over the text, in the space in which it is trained; 1 minus R² about the mean of these tokens.
        epochs: How often the text was begun.
        model: Fingerprint of the model.
        text: Fingerprint of the text.
    """

    path: Path
    sites: tuple[ResidualSite, ...]
    history: list[dict[str, Any]]
    epochs: int
    model: dict[str, Any]
    text: dict[str, Any]


def train_sae(
    model: TransformersModel,
    sites: Sequence[int | str | ResidualSite] | None = None,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    corpus: Corpus | TokenBlocks | None = None,
    lens: Lens | None = None,
    batch_size: int = 8,
    checkpoint_every: int = 8,
    progress: Progress | None = None,
) -> Trained:
    """Train a sparse autoencoder on the training documents of a text; the same call resumes what was interrupted, to the same bits.

    Args:
        model: What `load_model` returned.
        sites: Where; by default all blocks, for a multi-layer SAE.
        recipe: How.
        out: A folder for checkpoints and the result.
        corpus: The text, tokenised already or not; by default as much of the embedded one as the recipe asks for.
        lens: Carries the residuals of each layer to the last one first. It is kept beside the SAE, since all uses of it need the lens.
        batch_size: Token blocks per forward pass.
        checkpoint_every: Buffers between checkpoints.
        progress: Told of tokens read and rows trained on.

    Raises:
        DictionaryError: The recipe does not fit the model, or `out` holds the checkpoint of another training.
        SiteError: A site does not exist, or the lens does not know it.
        TextError: The text cannot be read or is too short.
        ActivationError: A residual is not finite; the last checkpoint stays as it is.
        FileFormatError: No checkpoint in `out` can be read.
        OutputError: `out` cannot be written, or another process is training there.
    """
    info, recipe = describe(model), recipe or Recipe()
    chosen = tuple(sorted({ResidualSite.parse(site, info.blocks) for site in (range(info.blocks) if sites is None else sites)}))
    if not chosen:
        raise DictionaryError("no sites to train on: give at least one")
    if recipe.k > recipe.expansion * info.d_model:
        raise DictionaryError(f"k {recipe.k} is more than {recipe.expansion * info.d_model} latents")
    if lens is not None:
        lens.check_fits(info, chosen)
    folder = prepare_folder(Path(out).expanduser())
    corpus = corpus or default_corpus(recipe)
    blocks = tokenize(model, corpus, progress).only("train")
    request = {
        "schema": SCHEMA,
        "recipe": asdict(recipe),
        "model": {**info.contents(), "config": info.config},
        "text": {"digest": blocks.fingerprint["digest"], "context": blocks.context},
        "sites": [site.key for site in chosen],
        "lens": None if lens is None else lens.digest,
        "batch_size": batch_size,
        "sink_ratio": SINK_RATIO,
    }
    metadata = origin(info, chosen) | {
        "nnato_recipe": asdict(recipe),
        "nnato_text": blocks.fingerprint,
        "nnato_lens": None if lens is None else lens.digest,
        "nnato_provenance": provenance(),
    }
    rows = _Rows(model, blocks, chosen, recipe, lens, batch_size)
    training = _Training(recipe, info.d_model, chosen, next(model._module.parameters()).device)
    checkpoints = Checkpoints(folder / CHECKPOINT, KIND)
    with checkpoints.held():
        _run(training, rows, request, checkpoints, checkpoint_every, progress)
        if lens is not None:
            lens.save(folder)
        training.save(folder, metadata, rows.factor or 1.0)
    return Trained(folder, chosen, training.history, rows.epochs, info.fingerprint(), blocks.fingerprint)


def _run(
    training: _Training, rows: _Rows, request: Mapping[str, Any], checkpoints: Checkpoints, every: int, progress: Progress | None
) -> None:
    """Train to the end, from the last checkpoint on."""
    if found := checkpoints.read():
        _restore(checkpoints.file, *found, request, training, rows)
    while not training.finished:
        if progress is not None:
            progress("training", training.trainer.n_training_samples, training.samples)
        try:
            training.learn(rows.fill(), rows.fresh)
        except NonFinite as error:
            raise located(error, rows.model, rows.tokens) from None
        if training.finished or rows.fills % every == 0:
            checkpoints.write(*_snapshot(request, training, rows))
    checkpoints.finish()
    if progress is not None:
        progress("training", training.samples, training.samples)


def default_corpus(recipe: Recipe) -> Corpus:
    """The embedded text, as much of it as a recipe asks for, and so much that every split has documents."""
    return Corpus(tokens=max(math.ceil(recipe.tokens / FRACTIONS[0]), LEAST_TEXT), per_document=PER_DOCUMENT)


def geometric_median(rows: torch.Tensor, steps: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point with the smallest sum of distances to all rows, by Weiszfeld's iteration; float64 (d,) for float (n, d)."""
    points = rows.double()
    point = points.mean(0)
    for _ in range(steps):
        # A row at the point itself would have infinite weight.
        weights = 1 / torch.linalg.vector_norm(points - point, dim=1).clamp(min=1e-10)
        moved: torch.Tensor = (weights @ points) / weights.sum()
        if float(torch.linalg.vector_norm(moved - point)) <= tolerance * float(torch.linalg.vector_norm(moved)):
            return moved
        point = moved
    return point


class _Rows:
    """Buffers of shuffled rows, one after the other.

    Attributes:
        fills: Buffers so far.
        cursor: Forward passes so far.
        rest: Rows that were left over from the last buffer, float32 (n, d_model).
        factor: What rows are multiplied with.
        fresh: Of the last buffer some tokens as they come, float32 (sites, tokens, d_model).
        tokens: The last batch.
    """

    def __init__(
        self,
        model: TransformersModel,
        blocks: TokenBlocks,
        sites: tuple[ResidualSite, ...],
        recipe: Recipe,
        lens: Lens | None,
        batch_size: int,
    ) -> None:
        self.model, self.blocks, self.sites, self.recipe, self.lens = model, blocks, sites, recipe, lens
        self.plan = blocks.plan(batch_size)
        self.classes = TokenClasses()
        self.fills = self.cursor = 0
        self.factor: float | None = None if recipe.scale == "mean" else 1.0
        self.rest: torch.Tensor | None = None

    @property
    def epochs(self) -> int:
        """How often the text was begun."""
        return -(-self.cursor // len(self.plan))

    def fill(self) -> torch.Tensor:
        """The next buffer, float32 (rows, d_model): a multiple of a step's rows."""
        parts = [] if self.rest is None else [self.rest]
        count = sum(len(part) for part in parts)
        first = True
        while count < self.recipe.buffer:
            x = self._pass()
            if first:
                self.fresh, first = x[:, :PROBE], False
            parts.append(rearrange(x, "layer token width -> (token layer) width"))
            count += len(parts[-1])
        rows = torch.cat(parts)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.fills))
        whole = count - count % self.recipe.rows
        self.rest = rows[order[whole:].to(rows.device)]
        self.fills += 1
        return rows[order[:whole].to(rows.device)]

    def _pass(self) -> torch.Tensor:
        """Rows of one forward pass as they go into the SAE, float32 (sites, ordinary tokens, d_model)."""
        self.tokens = self.blocks.batch(self.plan[self.cursor % len(self.plan)])
        residuals = capture(self.model, self.tokens.ids, self.sites)
        if place := non_finite(residuals, self.tokens.mask.to(residuals.device)):
            raise NonFinite(place[1], place[2], self.sites[place[0]], place[3])
        ordinary = self.classes.ordinary(self.tokens.ids, self.tokens.mask, self.tokens.special, residuals)
        self.cursor += 1
        x = residuals[:, ordinary].float()
        if self.lens is not None:
            x = self.lens.to_shared(x, self.sites)
        if self.recipe.scale == "token":
            return standardise(x)[0]
        if self.factor is None:
            self.factor = x.shape[-1] ** 0.5 / float(torch.linalg.vector_norm(x, dim=-1).mean())
        return x * self.factor


class _Training:
    """sae_lens' trainer, fed by hand.

    Attributes:
        samples: Rows to train on in all.
        history: As in `Trained`.
    """

    def __init__(self, recipe: Recipe, d_model: int, sites: tuple[ResidualSite, ...], device: torch.device) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what sae_lens imports
            from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
            from sae_lens.config import SAETrainerConfig
            from sae_lens.training.sae_trainer import SAETrainer
        latents = recipe.expansion * d_model
        topk = recipe.kind == "topk"
        steps = max(recipe.tokens * len(sites) // recipe.rows, 1)
        # The threshold of BatchTopK is a moving average that starts at zero: let a short run forget that.
        average = {} if topk else {"topk_threshold_lr": min(max(0.01, 10 / steps), 1.0)}
        config = (TopKTrainingSAEConfig if topk else BatchTopKTrainingSAEConfig)(
            d_in=d_model,
            d_sae=latents,
            k=recipe.k,
            device=str(device),
            decoder_init_norm=1.0,
            aux_loss_coefficient=recipe.aux,
            rescale_acts_by_decoder_norm=True,
            apply_b_dec_to_input=True,
            **average,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.sae: Any = (TopKTrainingSAE if topk else BatchTopKTrainingSAE)(config)
        lr = recipe.lr or 2e-4 / math.sqrt(latents / 2**14)
        dead = recipe.dead_tokens or min(recipe.tokens // 10, 10_000_000)
        self.samples, self.sites, self.recipe = steps * recipe.rows, sites, recipe
        self.trainer: Any = SAETrainer(
            SAETrainerConfig(
                total_training_samples=self.samples,
                train_batch_size_samples=recipe.rows,
                lr=lr,
                lr_end=lr,
                lr_warm_up_steps=min(1000, steps // 10),
                lr_decay_steps=steps // 5,
                dead_feature_window=max(dead * len(sites) // recipe.rows, 1),
                device=str(device),
            ),
            self.sae,
            iter(()),
        )
        self.history: list[dict[str, Any]] = []

    @property
    def finished(self) -> bool:
        """Whether all rows were trained on."""
        return bool(self.trainer.n_training_samples >= self.samples)

    def learn(self, rows: torch.Tensor, fresh: torch.Tensor) -> None:
        """Train on a buffer, float32 (rows, d_model), after scoring what the SAE makes of some of its tokens, (sites, tokens, d_model)."""
        if not self.trainer.n_training_steps:
            with torch.no_grad():
                self.sae.b_dec.copy_(geometric_median(rows[: 2 * self.recipe.rows]))
        entry = {"tokens": self.trainer.n_training_samples // len(self.sites), "fvu": self._fvu(fresh)}
        for batch in torch.split(rows, self.recipe.rows):
            if self.finished:
                break
            self.trainer.maybe_reset_sparsity()
            step = self.trainer.step(batch)
            self.trainer.n_training_steps += 1
        self.history.append(entry | {"loss": step.loss.item(), "dead": self.trainer.dead_neurons.double().mean().item()})

    @torch.no_grad()
    def _fvu(self, x: torch.Tensor) -> dict[str, float]:
        found = {}
        for site, rows in zip(self.sites, x, strict=True):
            error = (self.sae.decode(self.sae.encode(rows)) - rows).double().square().sum()
            found[str(site)] = float(error / (rows - rows.mean(0)).double().square().sum())
        return found

    def save(self, folder: Path, metadata: Mapping[str, Any], factor: float) -> None:
        """Write the SAE for inference, in sae_lens' format, to take residuals before the factor. It ends the training."""
        self.trainer.set_final_sae_metadata()
        for name, value in metadata.items():
            setattr(self.sae.cfg.metadata, name, value)
        if self.recipe.scale == "token":
            self.sae.cfg.normalize_activations = "layer_norm"  # only now: the auxiliary loss refuses it, and rows were standardised
        elif self.recipe.scale == "mean":
            self.sae.fold_activation_norm_scaling_factor(factor)
        with atomic_folder(folder, "cfg.json") as scratch:
            self.sae.save_inference_model(scratch)


# ---- checkpoints -----------------------------------------------------------------------------------------------------------


def _parts(training: _Training) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything the trainer changes, by name."""
    yield from ((f"sae.{name}", tensor) for name, tensor in training.sae.state_dict().items())
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        yield name, getattr(training.trainer, name)
    for number, parameter in enumerate(training.trainer.optimizer.param_groups[0]["params"]):
        state = training.trainer.optimizer.state[parameter]
        if not state:  # as Adam makes it at its first step
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        yield from ((f"adam.{number}.{name}", state[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def _snapshot(request: Mapping[str, Any], training: _Training, rows: _Rows) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = dict(_parts(training)) | {"rest": rows.rest, "medians": rows.classes.medians}
    trainer = training.trainer
    metadata = {
        "request": dict(request),
        "samples": trainer.n_training_samples,
        "steps": trainer.n_training_steps,
        "counted": trainer.n_frac_active_samples,
        "fills": rows.fills,
        "cursor": rows.cursor,
        "factor": rows.factor,
        "history": training.history,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, metadata


def _restore(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Metadata, request: Mapping[str, Any], training: _Training, rows: _Rows
) -> None:
    if metadata.get("request") != dict(request):
        raise DictionaryError(f"{file} is the checkpoint of another training; choose another --out, or delete it")
    expected, trainer = dict(_parts(training)), training.trainer
    _check(file, tensors, metadata, expected, training)
    with torch.no_grad():
        training.sae.load_state_dict({name.removeprefix("sae."): tensors[name] for name in expected if name.startswith("sae.")})
        for name, tensor in expected.items():
            if not name.startswith("sae."):
                tensor.copy_(tensors[name])
    trainer.n_training_samples, trainer.n_training_steps = metadata["samples"], metadata["steps"]
    trainer.n_frac_active_samples, training.history = metadata["counted"], metadata["history"]
    rows.fills, rows.cursor, rows.factor = metadata["fills"], metadata["cursor"], metadata["factor"]
    rows.rest, rows.classes.medians = tensors["rest"].to(trainer.cfg.device), tensors["medians"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule is walked without the optimizer, so that it ends at the same rates
        for _ in range(trainer.n_training_steps):
            trainer.lr_scheduler.step()


def _check(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Metadata, expected: Mapping[str, torch.Tensor], training: _Training
) -> None:
    """Refuse a checkpoint of this request whose contents do not fit together."""
    recipe, sites = training.recipe, len(training.sites)
    shapes: dict[str, tuple[Any, ...]] = {name: (*tensor.shape, tensor.dtype) for name, tensor in expected.items()}
    shapes["medians"] = (sites, torch.float64)
    left = tensors["rest"].shape[0] if "rest" in tensors and tensors["rest"].dim() else 0
    shapes["rest"] = (left, training.sae.cfg.d_in, torch.float32)
    require(
        {name: (*tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == shapes, file, "its tensors are not those of a training"
    )
    for name, tensor in tensors.items():
        require(bool(torch.isfinite(tensor).all()), file, f"{name} is not finite")
    require_entries(metadata, file, samples=int, steps=int, counted=int, fills=int, cursor=int, factor=float, history=list)
    counts = [metadata[name] for name in ("samples", "steps", "counted", "fills", "cursor")]
    whole = metadata["samples"] == metadata["steps"] * recipe.rows and metadata["samples"] <= training.samples
    require(min(counts) >= 0 and whole and math.isfinite(metadata["factor"]), file, "its counts do not fit together")
    entry = {"tokens", "fvu", "loss", "dead"}
    require(all(isinstance(one, dict) and set(one) == entry for one in metadata["history"]), file, "its history lacks entries")
