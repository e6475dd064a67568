"""Residuals of a running trace that are read only when they are used. Plain functions and a plain class, which travel to a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent

from nnato.errors import SiteError
from nnato.sites import ResidualSite

if TYPE_CHECKING:
    from nnato.trace import ATOTrace


class Residual(torch.Tensor):
    """A residual that was asked for but not waited for; float, shape (batch, positions, d_model).

    It is empty until its worker has read it. Any use of it in torch waits for that and goes on with plain tensors; after the trace it
    is a plain tensor itself.
    """

    trace: ATOTrace
    site: ResidualSite
    value: torch.Tensor | None

    @staticmethod
    def ask(trace: ATOTrace, site: ResidualSite) -> Residual:
        """A residual of this trace, not read yet."""
        asked: Residual = torch.Tensor._make_subclass(Residual, torch.empty(0))
        asked.trace, asked.site, asked.value = trace, site, None
        return asked

    def wait(self) -> torch.Tensor:
        """The value; inside the trace this waits for the model to reach the site."""
        if self.value is None:
            if current_worker() is None:
                raise SiteError(f"residual {self.site} was never read: the forward pass did not reach it")
            seen = self.trace._read(self.site)  # parks here; our own worker, earlier in the list, holds the value as asked for
            if self.value is None:
                self.value = seen
        return self.value

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Wait, then call `func` on plain tensors."""
        return func(*plain(args), **plain(kwargs or {}))


def plain(tree: Any) -> Any:
    """The same structure with every `Residual` replaced by its tensor, waiting where needed."""
    if type(tree) is Residual:
        return tree.wait()
    if type(tree) in (list, tuple):
        return type(tree)([plain(leaf) for leaf in tree])
    if type(tree) is dict:
        return {key: plain(leaf) for key, leaf in tree.items()}
    return tree


def has_residual(tree: Any) -> bool:
    """Whether a `Residual` is in this structure."""
    if type(tree) in (list, tuple):
        return any(has_residual(leaf) for leaf in tree)
    if type(tree) is dict:
        return any(has_residual(leaf) for leaf in tree.values())
    return type(tree) is Residual


def current_worker() -> Any:
    """The Mediator whose code is running, or None outside a forward pass."""
    reference = getattr(getcurrent(), "mediator", None)
    return None if reference is None else reference()
