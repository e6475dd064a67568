"""Where the transformer blocks of a model are, in any architecture."""

from __future__ import annotations

from typing import Any

import torch

from nnato.errors import ModelError


def find_blocks(module: torch.nn.Module) -> tuple[str, int, int]:
    """Find the list of transformer blocks of a causal language model, in any architecture.

    Returns:
        Module path of the list, number of blocks, residual width.

    Raises:
        ModelError: There is no such list, or more than one.
    """
    config: Any = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    blocks, d_model = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if blocks is None or d_model is None:
        raise ModelError(f"{type(module).__name__} does not say num_hidden_layers and hidden_size in its config")
    lists = [
        path
        for path, child in module.named_modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) == blocks and len({type(block) for block in child}) == 1
    ]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(module).__name__} has {len(outermost)} lists of {blocks} blocks ({', '.join(outermost) or 'none'}); "
            "nnato needs a decoder with exactly one"
        )
    return outermost[0], blocks, d_model


def find_head(module: torch.nn.Module) -> str:
    """Module path of the language-model head, which makes logits of the last residual.

    Raises:
        ModelError: The model has none.
    """
    model: Any = module
    head = model.get_output_embeddings()
    for path, child in module.named_modules():
        if child is head:
            return str(path)
    raise ModelError(f"{type(module).__name__} has no language-model head")
