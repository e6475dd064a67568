"""One dictionary for all layers (arXiv 2409.04185): loading it, its sparse codes, and what it makes of a text, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import check_ended, tokenize
from nnato.corpus import SPLITS, Corpus, TokenBlocks
from nnato.dictionaries import Dictionary, load_dictionary
from nnato.errors import DictionaryError, FileFormatError, MomentsError, SiteError
from nnato.intervals import Interval, share_explained
from nnato.layer_stats import LayerStats, Reconstruction, merged
from nnato.lens import FILE as LENS_FILE
from nnato.lens import Lens
from nnato.models import ModelInfo, describe
from nnato.operators import AffineMap
from nnato.reduction import SINK_RATIO
from nnato.remote import Server
from nnato.remote_layers import RemoteLayers, add_tokens
from nnato.shards import Shard
from nnato.sites import ResidualSite
from nnato.statistics import Progress, ResidualBatch
from nnato.storage import SCHEMA, Metadata, prepare_folder, read_artifact, require, require_entries
from nnato.streaming import stream

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

KIND = "layer-stats"
FILE = "layers.safetensors"
TOKENS = 100_000
"""Tokens of all splits in the default text, of two blocks per document."""


@dataclass(frozen=True)
class MultiLayerSAE:
    """A dictionary that is read at several layers.

    Attributes:
        dictionary: The dictionary.
        sites: The layers.
        lens: Carries residuals to where the dictionary was trained; None if it was trained on them as they are.
    """

    dictionary: Dictionary = field(repr=False)
    sites: tuple[ResidualSite, ...]
    lens: Lens | None = field(default=None, repr=False)

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.dictionary.latents

    def beside(self, model: TransformersModel) -> MultiLayerSAE:
        """The same on the device of a model; a lens follows its input by itself."""
        return replace(self, dictionary=self.dictionary.to(next(model._module.parameters()).device))

    def shared(self, x: torch.Tensor, sites: Sequence[ResidualSite] | None = None) -> torch.Tensor:
        """Residuals where the dictionary reads them.

        Args:
            x: Float (sites, …, d_model).
            sites: Whose they are; all by default.

        Returns:
            float32 (sites, …, d_model).
        """
        return x.float() if self.lens is None else self.lens.to_shared(x.float(), sites or self.sites)

    def encode(self, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse codes of what `shared` returned, float (…, d_model).

        Returns:
            Activations, float32 (…, k), some of which may be zero, and their latents, int64 (…, k). k is that of a TopK dictionary, for
            others the largest number of active latents.
        """
        return self.dictionary.codes(shared)

    def decode(self, values: torch.Tensor, latents: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """Reconstructions in the space of `shared`, float32 (…, d_model), from codes as `encode` gives them."""
        return self.dictionary.decode_sparse(values, latents, shared)

    def translators(self) -> tuple[AffineMap | None, ...]:
        """What `shared` does to each layer, as plain maps in float32, which can travel to a server; None where it does nothing."""
        lens = self.lens
        if lens is None:
            return (None,) * len(self.sites)
        return tuple(None if site == lens.last else _plain(lens.translators[site]) for site in self.sites)

    def check_fits(self, info: ModelInfo) -> None:
        """Refuse it for another model.

        Raises:
            DictionaryError: The dictionary is of another model or width.
            SiteError: A site does not exist.
            OperatorError: The lens is of another model.
        """
        for site in self.sites:
            ResidualSite.parse(site, info.blocks)
        # An SAE of one layer may be read at all of them, to compare with; so only model and width have to fit.
        self.dictionary.check_fits(info.fingerprint(), self.dictionary.sites[0] if self.dictionary.sites else self.sites[0])
        if self.lens is not None:
            self.lens.check_fits(info, self.sites)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies it, in JSON."""
        sites = [site.key for site in self.sites]
        return {"dictionary": self.dictionary.fingerprint(), "sites": sites, "lens": None if self.lens is None else self.lens.digest}


def _plain(one: AffineMap) -> AffineMap:
    return AffineMap.make(one.source, one.target, one.weight.float(), one.source_mean.float(), one.target_mean.float())


def load_multilayer(
    reference: str | Path,
    info: ModelInfo,
    sites: Sequence[int | str | ResidualSite] | None = None,
    lens: Lens | None = None,
) -> MultiLayerSAE:
    """Load a multi-layer SAE, or an SAE of one layer to be read at several.

    Args:
        reference: As in `load_dictionary`: a folder of `nnato mlsae train` or of the authors, or any other SAE.
        info: The model it is read with.
        sites: Layers; by default those it was trained at, or all blocks if it does not say.
        lens: Carries residuals to the last layer first; by default the one in its folder, if it was trained with one.

    Raises:
        DictionaryError: It cannot be read, or is of another model, or the lens it was trained with is missing.
        SiteError: A site does not exist.
    """
    dictionary = load_dictionary(reference)
    chosen = dictionary.sites if sites is None else tuple(sorted({ResidualSite.parse(site, info.blocks) for site in sites}))
    folder = Path(str(reference).removeprefix("mlsae:")).expanduser()
    if lens is None and (folder / LENS_FILE).is_file():
        lens = Lens.load(folder)
    if dictionary.lens is not None and (lens is None or lens.digest != dictionary.lens):
        raise DictionaryError(f"{dictionary} was trained behind a lens: give that one, since nothing else fits it")
    sae = MultiLayerSAE(dictionary, chosen or tuple(map(ResidualSite, range(info.blocks))), lens)
    sae.check_fits(info)
    return sae


# ---- one pass over a text ----------------------------------------------------------------------------------------------------


class LayerStatistic:
    """A `statistics.Statistic`: layer statistics and reconstruction of a multi-layer SAE, by fold.

    Args:
        sae: The SAE.
        d_model: Width of the residual stream.

    Attributes:
        sites: The layers.
        folds: Layer statistics by fold.
        errors: Reconstruction by fold, in the space where the dictionary reads.
    """

    def __init__(self, sae: MultiLayerSAE, d_model: int) -> None:
        self.sae, self.d_model, self.sites = sae, d_model, sae.sites
        self.folds: dict[int, LayerStats] = {}
        self.errors: dict[int, Reconstruction] = {}

    def update(self, batch: ResidualBatch) -> None:
        """Add a batch's ordinary tokens.

        Raises:
            NonFinite: With the place; nothing was added.
        """
        batch.check_finite()
        add_tokens(self.sae.dictionary, self.sae.shared(batch.residuals[:, batch.ordinary]), *self._fold(batch.fold))

    def merge(self, fold: int, stats: LayerStats, errors: Reconstruction) -> None:
        """Add sums of other tokens of a fold."""
        mine = self._fold(fold)
        self.folds[fold], self.errors[fold] = mine[0].merge(stats), mine[1].merge(errors)

    def _fold(self, fold: int) -> tuple[LayerStats, Reconstruction]:
        if fold not in self.folds:
            self.folds[fold] = LayerStats(self.sites, self.sae.latents)
            self.errors[fold] = Reconstruction(len(self.sites), self.d_model)
        return self.folds[fold], self.errors[fold]

    def state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON of all sums."""
        tensors, counts = sums_to_store(self.folds, self.errors)
        return tensors, {"sae": self.sae.fingerprint(), "d_model": self.d_model, "tokens": counts}

    def restore(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over a stored state of the same SAE.

        Raises:
            MomentsError: It does not fit.
        """
        if metadata.get("sae", {}).get("dictionary", {}).get("digest") != self.sae.dictionary.fingerprint()["digest"]:
            raise MomentsError("the stored layer statistics are of another SAE")
        self.folds, self.errors = stored_sums(tensors, metadata, self.sites, self.sae.latents)


def stored_sums(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], sites: Sequence[ResidualSite], latents: int
) -> tuple[dict[int, LayerStats], dict[int, Reconstruction]]:
    """Layer statistics and reconstruction by fold, from what `LayerStatistic.state` gave.

    Raises:
        MomentsError: They are not of so many layers and latents.
    """
    folds, reconstruction = {}, {}
    for key, count in metadata["tokens"].items():
        stats, errors = LayerStats(sites, latents), Reconstruction(len(sites), metadata["d_model"])
        stats.take(count, {name: tensors[f"{key}.{name}"] for name in stats.tensors() if f"{key}.{name}" in tensors})
        names = {name: f"{key}.errors.{name}" for name in errors.tensors()}
        errors.take(count, {name: tensors[stored] for name, stored in names.items() if stored in tensors})
        folds[int(key)], reconstruction[int(key)] = stats, errors
    return folds, reconstruction


def sums_to_store(folds: Mapping[int, LayerStats], errors: Mapping[int, Reconstruction]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Tensors and numbers of tokens from which `stored_sums` makes the same sums."""
    tensors = {f"{fold}.{name}": tensor for fold, stats in folds.items() for name, tensor in stats.tensors().items()}
    tensors |= {f"{fold}.errors.{name}": tensor for fold, sums in errors.items() for name, tensor in sums.tensors().items()}
    return tensors, {str(fold): stats.tokens for fold, stats in folds.items()}


@dataclass(frozen=True)
class LayerActivity:
    """What a multi-layer SAE makes of a text.

    Attributes:
        sites: The layers.
        folds: Layer statistics of each fold of documents.
        reconstruction: Of each fold.
        model: Fingerprint of the model.
        text: Fingerprint of the text.
        sae: Fingerprint of the SAE.
        split: Which documents were read.
    """

    sites: tuple[ResidualSite, ...]
    folds: tuple[LayerStats, ...]
    reconstruction: tuple[Reconstruction, ...] = field(repr=False)
    model: dict[str, Any] = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    sae: dict[str, Any] = field(repr=False)
    split: str = "test"

    @property
    def stats(self) -> LayerStats:
        """All folds together."""
        return merged(self.folds)

    def metrics(self) -> list[dict[str, Any]]:
        """How well each layer is reconstructed, where the dictionary reads (so behind a lens).

        Returns:
            By layer: `site`; `fvu`, an `Interval`: errors over squared deviations from the mean of each coordinate; `fvu_mlsae`: over those
            from one mean of all coordinates, as the authors take it, which is smaller; `mse`; `l0`; `l1`.
        """
        whole = self.reconstruction[0]
        for part in self.reconstruction[1:]:
            whole = whole.merge(part)
        joint, rows = whole.joint_power, []
        for number, site in enumerate(self.sites):
            errors = torch.stack([part.errors[number] for part in self.reconstruction])
            powers = torch.stack([part.power[number].sum() for part in self.reconstruction])
            power = float(whole.power[number].sum())
            # Deviations are from the mean of all folds: what folds lack of that is spread over them by their tokens.
            shares = torch.tensor([part.n / whole.n for part in self.reconstruction], dtype=torch.float64)
            explained = share_explained(errors, powers + shares * (power - powers.sum()))
            rows.append(
                {
                    "site": site.key,
                    "fvu": Interval(1 - explained.value, 1 - explained.high, 1 - explained.low),
                    "fvu_mlsae": float(whole.errors[number]) / float(joint[number]) if joint[number] > 0 else math.nan,
                    "mse": float(whole.errors[number]) / (whole.n * whole.mean.shape[1]),
                    "l0": float(whole.active[number]) / whole.n,
                    "l1": float(whole.strength[number]) / whole.n,
                }
            )
        return rows


def layer_activity(
    model: TransformersModel,
    sae: MultiLayerSAE,
    corpus: Corpus | TokenBlocks | None = None,
    *,
    split: str = "test",
    out: str | Path | None = None,
    batch_size: int = 8,
    server: Server | None = None,
    per_job: int = 64,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> LayerActivity:
    """Stream documents through a model once and add up what a multi-layer SAE makes of each layer; memory does not grow with the text.

    Args:
        model: The model.
        sae: The SAE.
        corpus: The text, tokenised already or not; by default so much of the embedded one.
        split: Which documents are read.
        out: A folder for checkpoints and the result; the same call resumes.
        batch_size: Token blocks per forward pass; also what the published numbers take for a batch.
        server: Run the forward passes, encoding and decoding on it, e.g. `NdifServer()`: the SAE's weights travel there with each job, and
            sums come back, however many tokens there are. A failed job is all that a rerun repeats.
        per_job: Batches in one job on a server, at most.
        shard: Read this part of the text only; `layer_merging.merge_layer_shards` puts all of them together.
        progress: Told of tokens read and batches done.

    Raises:
        DictionaryError: The SAE is of another model.
        TextError: The text cannot be read or is too short.
        MomentsError: `out` holds statistics of another request, or a shard has no `out`, or one is given with a server.
        ActivationError: A residual is not finite.
        RemoteError: A job on the server failed.
        OutputError: `out` cannot be written.
    """
    info = describe(model)
    sae.check_fits(info)
    if shard is not None and (out is None or server is not None):
        raise MomentsError("a shard needs a folder to keep it in (out), and runs here: a server's jobs are parts of the text already")
    file = None if out is None else prepare_folder(Path(out).expanduser()) / FILE
    blocks = tokenize(model, corpus or Corpus(tokens=TOKENS), progress).only(split)
    device = next(model._module.parameters()).device if server is None else torch.device("cpu")
    statistic = LayerStatistic(MultiLayerSAE(sae.dictionary.to(device), sae.sites, sae.lens), info.d_model)
    request = {
        "schema": SCHEMA,
        "model": {**info.contents(), "config": info.config},
        "text": {"digest": blocks.fingerprint["digest"], "context": blocks.context, "split": split},
        "sae": {**sae.fingerprint(), "dictionary": sae.dictionary.fingerprint()["digest"]},
        "batch_size": batch_size,
        "sink_ratio": SINK_RATIO,
    }
    about = {"model": info.fingerprint(), "text": blocks.fingerprint, "split": split}
    remote = None
    if server is not None:
        coder = statistic.sae.dictionary.plain(device)
        remote = RemoteLayers(server, per_job, coder, sae.sites, sae.translators(), statistic.merge)
        remote.announce(blocks, blocks.plan(batch_size))
    stream(
        model,
        blocks,
        statistic,
        request,
        about,
        file=file,
        kind=KIND,
        batch_size=batch_size,
        remote=remote,
        shard=shard,
        progress=progress,
    )
    return _activity(statistic, {**about, "sae": sae.fingerprint()})


def load_layer_activity(path: str | Path, sae: MultiLayerSAE) -> LayerActivity:
    """Read what `layer_activity` wrote for an SAE: the file, or its folder.

    Raises:
        FileFormatError: No such file, or not a readable one of this kind.
        MomentsError: It is of another SAE, not finished, or one shard only.
    """
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    tensors, metadata = read_artifact(file, KIND)
    check_layer_file(file, metadata)
    require(metadata["d_model"] == sae.dictionary.d_model, file, "it is of another width")
    if "shard" in metadata:
        raise MomentsError(f"{file} holds one shard of a text only: nnato merge puts all its shards together")
    try:
        statistic = LayerStatistic(sae, metadata["d_model"])
        statistic.restore(tensors, metadata)
        return _activity(statistic, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, SiteError, DictionaryError) as error:
        raise FileFormatError(f"{file} is inconsistent ({type(error).__name__}: {error}); make it again") from None


def check_layer_file(file: Path, metadata: Metadata) -> None:
    """Refuse the metadata of layer statistics that lack something, or of a run that has not come to its end.

    Raises:
        FileFormatError: Something is missing or makes no sense.
        MomentsError: The run has not ended.
    """
    records = ("request", "model", "text", "sae", "tokens", "medians", "excluded")
    require_entries(metadata, file, d_model=int, cursor=int, batches=int, split=str, sinks=list, **dict.fromkeys(records, dict))
    require(metadata["split"] in SPLITS, file, f"split {metadata['split']!r} is none of {', '.join(SPLITS)}")
    require(len(metadata["tokens"]) > 0, file, "it holds no tokens")
    sinks_fit = all(isinstance(one, list) and [type(part) for part in one] == [int, int, str] for one in metadata["sinks"])
    require(sinks_fit, file, "sinks holds something else than tokens, their counts and texts")
    check_ended(file, metadata)


def _activity(statistic: LayerStatistic, metadata: Mapping[str, Any]) -> LayerActivity:
    folds = sorted(statistic.folds)
    return LayerActivity(
        statistic.sites,
        tuple(statistic.folds[fold] for fold in folds),
        tuple(statistic.errors[fold] for fold in folds),
        metadata["model"],
        metadata["text"],
        metadata["sae"],
        metadata["split"],
    )
