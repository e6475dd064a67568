"""Models: find one by name, load it without surprises, and know its residual stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nnato.blocks import find_blocks
from nnato.embedded import DEFAULT_MODEL, EMBEDDED, LOAD_ERRORS, convert_gguf
from nnato.errors import MissingExtraError, ModelError, PositionError, did_you_mean, first_line
from nnato.nnsight_setup import HUB_IDS, TransformersModel

ON_SERVER = "on a server"


@dataclass(frozen=True)
class ModelInfo:
    """What identifies a model and its residual stream.

    Attributes:
        name: Hub id, folder or embedded name it was loaded from.
        revision: Commit on the hub, where known.
        architecture: Class of the transformers module.
        d_model: Width of the residual stream.
        blocks: Number of blocks.
        vocabulary: Number of output logits.
        dtype: Data type of the parameters.
        blocks_path: Module path of the list of blocks, e.g. `model.layers`.
        digest: BLAKE2 of names, shapes, checksums and evenly spaced entries of all parameters and buffers: follows the weights, not the
            name.
        config: BLAKE2 of the configuration and the attention implementation.
    """

    name: str
    revision: str | None
    architecture: str
    d_model: int
    blocks: int
    vocabulary: int
    dtype: str
    blocks_path: str
    digest: str
    config: str

    def fingerprint(self) -> dict[str, Any]:
        """All fields, for JSON and cache keys."""
        return asdict(self)

    def contents(self) -> dict[str, Any]:
        """What makes the weights of two models the same, whatever they are called and wherever they were loaded from."""
        return {key: getattr(self, key) for key in ("architecture", "d_model", "blocks", "dtype", "digest")}

    def fits(self, fingerprint: Mapping[str, Any]) -> bool:
        """Whether something of a model with this fingerprint can be used with ours.

        Between weights here and weights on a server only the shape can be compared, since the digest of the latter is not known.
        """
        mine = self.contents()
        if str(fingerprint.get("digest", "")).startswith(ON_SERVER) != self.digest.startswith(ON_SERVER):
            mine = {key: mine[key] for key in ("architecture", "d_model", "blocks")}
        return all(fingerprint.get(key, value) == value for key, value in mine.items())


def describe(model: TransformersModel) -> ModelInfo:
    """Identify a model loaded with `load_model`, or any nnsight `TransformersModel`.

    Of a model whose weights are on a server, nobody here knows their digest and dtype; the name it has there stands for them.

    Raises:
        ModelError: Its blocks cannot be found.
    """
    module = model._module
    path, blocks, d_model = find_blocks(module)
    parameter = next(module.parameters())
    away = parameter.device.type == "meta"
    return ModelInfo(
        name=module.config._name_or_path or type(module).__name__,
        revision=getattr(module.config, "_commit_hash", None),
        architecture=type(module).__name__,
        d_model=d_model,
        blocks=blocks,
        vocabulary=module.get_output_embeddings().weight.shape[0],
        dtype=ON_SERVER if away else str(parameter.dtype).removeprefix("torch."),
        blocks_path=path,
        digest=f"{ON_SERVER}: {model.to_model_key()}" if away else _digest(module),
        config=_config_digest(module),
    )


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous().view(torch.uint8)
        # A sum of bit patterns as integers sees every entry, and is exact in any order of summation.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        checksum = int(flat.contiguous().view(bits).sum(dtype=torch.int64))
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{checksum}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _config_digest(module: Any) -> str:
    ignored = ("_name_or_path", "transformers_version", "architectures", "dtype")
    config = {key: value for key, value in module.config.to_dict().items() if key not in ignored}
    text = json.dumps([config, module.config._attn_implementation], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load_model(
    name: str | None = None, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, remote: bool = False
) -> TransformersModel:
    """Load a causal language model for tracing.

    Args:
        name: `None` for the embedded default (gemma-3-270m of the extra `nnato[demo]`; SmolLM2 if only that is installed),
            `"gemma-3-270m"`, `"smollm2"`, a folder in Hugging Face format, a `.gguf` file, or a hub id such as `google/gemma-2-2b`.
        device: Where to put the weights; by default the first GPU, else the CPU. `"auto"` spreads them over all GPUs, with
            accelerate.
        dtype: Data type of the weights. Float32 is the fastest on most CPUs and the one all figures of nnato were measured in.
        remote: Load no weights, only tokenizer and architecture; the weights are on a server, which knows the model by the same name.

    Returns:
        An nnsight `TransformersModel`, in evaluation mode, its parameters without gradients.

    Raises:
        ModelError: The model does not exist, is gated or out of reach, or is no decoder nnato understands.
        MissingExtraError: The embedded model's package is not installed.
    """
    if name is None:
        name = next((known for known, spec in EMBEDDED.items() if spec.installed()), DEFAULT_MODEL)
    path = Path(name).expanduser()
    if remote:
        model = _without_weights(str(EMBEDDED[name].folder()) if name in EMBEDDED else name, path)
        model._module.config._name_or_path = name
        return model
    how: dict[str, Any] = {"dtype": dtype, "device_map": _device_map(device)}
    if name in EMBEDDED:
        module, tokenizer = _from_folder(EMBEDDED[name].folder(), how)
    elif path.suffix == ".gguf" and path.is_file():
        module, tokenizer = _from_folder(convert_gguf(path), how)
    elif path.is_dir():
        module, tokenizer = _from_folder(path, how)
    elif path.suffix == ".gguf" or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ModelError(
            f"no model {name!r}{did_you_mean(name, EMBEDDED)}: not an embedded name ({', '.join(EMBEDDED)}), a folder, a .gguf file, or a "
            "hub id owner/name"
        )
    else:
        module, tokenizer = _from_hub(name, how)
    module.config._name_or_path = name
    if how["device_map"] is None:
        module = module.to(_device(device))
    elif away := [parameter for parameter in module.parameters() if parameter.device.type == "meta"]:
        raise ModelError(f"{name} does not fit on the GPUs: {len(away)} of its weights are left; give a smaller dtype, or device 'cpu'")
    return wrap(module, tokenizer)


def _without_weights(name: str, path: Path) -> TransformersModel:
    from transformers import AutoTokenizer

    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().absolute())
        HUB_IDS[name] = name  # nnsight would ask the hub how the name is spelled
    elif path.suffix == ".gguf" or name.count("/") != 1:
        raise ModelError(f"{name!r} is no name that a server could know: give a hub id, or a folder that the server sees too")
    try:
        model = TransformersModel(name, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(name))
    except LOAD_ERRORS as error:
        raise _hub_error(name, error) from None
    find_blocks(model._module)
    return model


def _device_map(device: str | torch.device | None) -> str | None:
    """What transformers is told of devices; None if the model goes to one of them as a whole, which is checked first."""
    if device != "auto":
        _device(device)
        return None
    if find_spec("accelerate") is None:
        raise MissingExtraError("device 'auto' needs the package accelerate: pip install accelerate")
    return "auto"


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA says so by AssertionError
        raise ModelError(f"device {str(device)!r} cannot be used: {first_line(error)}") from None
    return chosen


def wrap(module: Any, tokenizer: Any) -> TransformersModel:
    """Make a transformers module and its tokenizer traceable: evaluation mode, no parameter gradients, structure checked.

    Raises:
        ModelError: Its blocks cannot be found, or it is no causal model.
    """
    find_blocks(module)
    module.eval().requires_grad_(False)
    _check_causal(module)
    return TransformersModel(module, task="text-generation", tokenizer=tokenizer)


@torch.no_grad()
def _check_causal(module: Any) -> None:
    """Two sequences that differ in their last token only; everything here rests on earlier positions not seeing it."""
    ids = torch.tensor([[0, 1], [0, 2]], device=next(module.parameters()).device)
    logits = module(input_ids=ids).logits[:, 0].float()
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3):
        raise ModelError(f"{type(module).__name__} is no causal language model: an earlier position sees a later token")


def check_text(model: TransformersModel, context: int, largest: int = 0) -> None:
    """Refuse text that a model cannot take.

    Args:
        model: The model.
        context: Tokens of a sequence.
        largest: The largest token id.

    Raises:
        PositionError: The sequences are longer than the model's context.
        ModelError: The tokenizer has more tokens than the model.
    """
    limit = getattr(model._module.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise PositionError(f"context {context}: the model takes at most {limit} tokens")
    rows = model._module.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ModelError(f"the tokenizer gives token {largest}, but the model has {rows} tokens: they do not belong together")


def _from_folder(folder: Path, how: dict[str, Any]) -> tuple[Any, Any]:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in names):
        raise ModelError(f"{folder} holds no tokenizer ({', '.join(names)}): save the model's own there")
    try:
        return _pretrained(str(folder), local_files_only=True, **how)
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder} holds no causal language model that transformers can load: {first_line(error)}") from None


def _from_hub(name: str, how: dict[str, Any]) -> tuple[Any, Any]:
    try:
        return _pretrained(name, **how)
    except LOAD_ERRORS as error:
        raise _hub_error(name, error) from None


def _hub_error(name: str, error: Exception) -> ModelError:
    text = f"{type(error).__name__}: {error}"  # transformers wraps network, gating and missing files in OSError
    if "gated" in text.lower() or "401" in text or "403" in text:
        remedy = f"it is gated: accept its terms at huggingface.co/{name} and run `hf auth login`"
    elif isinstance(error, OSError):
        remedy = "check the id, and that the hub can be reached (HF_HUB_OFFLINE is not set); or give a local folder"
    else:
        remedy = "it may be no causal language model, or need a newer transformers"
    return ModelError(f"cannot load {name!r} from the hub: {remedy}. ({first_line(error)})")


def _pretrained(name: str, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would draw over ours, and into pipes
    module, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} among them: its files are incomplete")
    return module, AutoTokenizer.from_pretrained(name, local_files_only=options.get("local_files_only", False))
