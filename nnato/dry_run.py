"""A dry run of remote traces: the very bytes of a request, executed in a fresh process in which nnato cannot be imported.

The process does with a request what a server's model actor does (deserialise, run under no_grad, send back what was saved), without queue,
ports or accounts: only pipes between this process and one that it started. So it shows whether what a block uses travels, what comes back
and how large both are. It shares with this process the machine, the Python and the library versions, which a real server need not.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnato.errors import ModelError, RemoteError
from nnato.nnsight_setup import NnsightRemoteError, RemoteBackend, TransformersModel
from nnato.remote import explain, in_words

__all__ = ["DryRunServer"]

SERVER = """
import contextlib, io, json, linecache, pickle, sys, traceback

class NoNnato:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnato":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoNnato())
wire, sys.stdout = sys.stdout.buffer, sys.stderr
import anyio._backends._asyncio
import torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc

name, dtype, threads = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = TransformersModel(name, task="text-generation", dispatch=True, dtype=dtype)
model._module.eval().requires_grad_(False)
half = dtype in (torch.bfloat16, torch.float16)

def answer(fine, data):
    wire.write(json.dumps({"fine": fine, "length": len(data)}).encode() + b"\\n" + data)
    wire.flush()

@contextlib.contextmanager
def own_sources():  # what a request registers of its source must not outlive it
    caches = linecache.cache, SOURCES, BLOCKS
    before = [dict(cache) for cache in caches]
    try:
        yield
    finally:
        for cache, old in zip(caches, before):
            cache.clear()
            cache.update(old)

answer(True, b"")
while line := sys.stdin.buffer.readline():
    request = json.loads(line)
    blob = sys.stdin.buffer.read(request["length"])
    try:
        with own_sources(), torch.no_grad(), torch.autocast(model.device.type, dtype if half else None, half):
            model._remoteable_set_env(request["env"])
            tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=request["compress"])
            inc()
            try:
                tracer.execute(tracer.info.code)
                saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
            finally:
                dec()
        buffer = io.BytesIO()
        try:
            torch.save(saved, buffer)
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except pickle.PickleError as error:
            kinds = {name: type(value).__name__ for name, value in saved.items()}
            raise TypeError(f"a dry run gives back tensors, numbers, text, lists and dicts of these only, not all of {kinds}") from error
        answer(True, buffer.getvalue())
    except Exception:
        answer(False, traceback.format_exc().encode())
    finally:
        model.interleaver.cancel()
"""


def _failed(text: str) -> RemoteError:
    return explain(NnsightRemoteError(text), "the dry run") if text.startswith("Traceback") else RemoteError(text)


class DryRunServer:
    """A process that serves one model to traces as an NDIF server would.

    In use::

        with DryRunServer("folder") as server:
            with ATOTrace(model, "The Eiffel Tower is in", backend=server.backend(model)) as t:
                logits = t.logits.save()
            print(server.sent, server.received)

    `model` may be without weights; it must be of the same architecture. The process computes on the CPU; half precision runs under
    autocast, as servers do it.

    Args:
        model: A folder in Hugging Face format (nothing is looked up on the hub then), or a hub id.
        dtype: Data type of the weights.
        say: Told what happens, in words.

    Attributes:
        sent: Bytes of the last request.
        received: Bytes of the last answer.
        host: What stands for an address.
        retries: 0, since nothing here fails by chance.
        say: As in `NdifServer`.

    Raises:
        ModelError: The process could not load the model; its last words are in the message.
    """

    host = "dry run"
    retries = 0

    def __init__(self, model: str | Path, dtype: torch.dtype = torch.float32, say: Callable[[str], None] = lambda text: None) -> None:
        self.say = say
        folder = Path(model).expanduser()
        environment = dict(os.environ)
        if folder.is_dir():
            model, environment["HF_HUB_OFFLINE"] = folder.absolute(), "1"
        self.sent = self.received = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        arguments = [str(model), str(dtype).removeprefix("torch."), str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER, *arguments],  # -P: modules beside the caller are not on a server either
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        try:
            self._read(lambda text: ModelError(f"the dry run cannot load {str(model)!r}: {text}"))
        except ModelError:
            self.close()
            raise

    def backend(self, model: TransformersModel) -> Any:
        """What runs a trace or session of `model` in this server: an nnsight backend, for one block.

        Errors in the block, and the end of the process, are raised as `RemoteError`, as a server's are.
        """
        server = self

        class DryRunBackend(RemoteBackend):  # type: ignore[misc]
            def request(self, request: Any, tracer: Any) -> Any:
                data = server._ask(self._serialize(tracer), {"compress": self.compress, "env": self.env}, _failed)
                server.say(f"dry run: {in_words(server.sent)} sent, {in_words(server.received)} came back")
                self.saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                return self.saved

            def wait(self) -> Any:
                return self.saved

        return DryRunBackend("dry-run", host="http://dry-run.invalid", env=model._remoteable_get_env())

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> DryRunServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, blob: bytes, header: dict[str, Any], error: Callable[[str], Exception]) -> bytes:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise error("the dry run is closed")
        try:
            stdin.write(json.dumps({**header, "length": len(blob)}).encode() + b"\n" + blob)
            stdin.flush()
        except BrokenPipeError:
            raise error(self._last_words()) from None
        self.sent = len(blob)
        data = self._read(error)
        self.received = len(data)
        return data

    def _read(self, error: Callable[[str], Exception]) -> bytes:
        stdout = self._process.stdout
        line = b"" if stdout is None else stdout.readline()
        if stdout is None or not line.endswith(b"\n"):
            raise error(self._last_words())
        header = json.loads(line)
        data = stdout.read(header["length"])
        if len(data) < header["length"]:
            raise error(self._last_words())
        if not header["fine"]:
            raise error(data.decode())
        return data

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-5:]
        return "\n".join([f"the server's process ended with code {code}", *lines])
