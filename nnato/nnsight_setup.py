"""Everything nnato takes from nnsight, imported with care; no other module imports nnsight."""

from __future__ import annotations

import contextlib
import warnings

with contextlib.suppress(ImportError, TypeError):
    # nnsight mounts `.save` on `object`; anyio must have defined its classes before that, or it refuses to define them (TypeError, if the
    # user imported nnsight first; then only nnsight's asynchronous backends are lost).
    import anyio._backends._asyncio  # noqa: F401
import nnsight
from nnsight import TransformersModel, save
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.backends.remote import RemoteError as NnsightRemoteError
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.intervention.util import clear_shared_locals
from nnsight.modeling.huggingface import _ID_CACHE as HUB_IDS
from nnsight.ndif import get_local_env
from nnsight.schema.config import CONFIG
from nnsight.tracing.tracer import Tracer, _saves, mark, push_result
from nnsight.tracing.util import push

# A pass that ends early, by an error or Ctrl-C, ends the block that waits for its values by GreenletExit; nnsight would warn of that.
warnings.filterwarnings("ignore", message="An intervention block raised .*GreenletExit", category=UserWarning)

nnsight.register("nnato")  # so that nnsight ships this package's classes and functions by value

__all__ = [
    "CONFIG",
    "HUB_IDS",
    "InterleavingTracer",
    "Iterations",
    "Mediator",
    "NnsightRemoteError",
    "OutOfOrderError",
    "RemoteBackend",
    "Tracer",
    "TransformersModel",
    "_saves",
    "clear_shared_locals",
    "get_local_env",
    "mark",
    "push",
    "push_result",
    "save",
]
