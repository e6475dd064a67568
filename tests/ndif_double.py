"""A double of an NDIF server: the real bytes of a request, executed in a fresh process in which nnato cannot be imported.

It does what the server's model actor does with a request (deserialise, run under no_grad, send back what was saved), without queue,
ports or Ray: only pipes between a test and a process it started. What is unpickled comes from the test itself.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

SERVER = """
import io, struct, sys, traceback

class NoNnato:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnato":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoNnato())
wire, sys.stdout = sys.stdout.buffer, sys.stderr
import anyio._backends._asyncio
import torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import _saves, dec, inc

torch.set_num_threads(1)
model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)
model._module.requires_grad_(False)

def answer(kind, data):
    wire.write(struct.pack("<BQ", kind, len(data)) + data)
    wire.flush()

answer(0, b"")
while header := sys.stdin.buffer.read(9):
    compress, length = struct.unpack("<BQ", header)
    blob = sys.stdin.buffer.read(length)
    try:
        tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=bool(compress))
        inc()
        try:
            with torch.no_grad():
                tracer.execute(tracer.info.code)
            saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        finally:
            dec()
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        answer(0, buffer.getvalue())
    except Exception:
        answer(1, traceback.format_exc().encode())
    finally:
        model.interleaver.cancel()
"""


class NdifDouble:
    """One server process for one checkpoint folder.

    Attributes:
        sent: Bytes of the last request.
        received: Bytes of the last answer.
    """

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.sent = self.received = 0
        self._read()

    def _read(self) -> bytes:
        import struct

        from nnsight.intervention.backends.remote import RemoteError

        header = self.process.stdout.read(9)
        if len(header) < 9:
            raise RemoteError(f"the server's process ended with code {self.process.wait()}")
        kind, length = struct.unpack("<BQ", header)
        data = self.process.stdout.read(length)
        if kind:
            raise RemoteError(data.decode())
        return data

    def ask(self, blob: bytes, compress: bool) -> bytes:
        """Send a request and wait for its answer."""
        import struct

        self.process.stdin.write(struct.pack("<BQ", compress, len(blob)) + blob)
        self.process.stdin.flush()
        self.sent = len(blob)
        data = self._read()
        self.received = len(data)
        return data

    def backend(self, model):
        """What nnsight's `_remote_backend` gives, with this process for a wire."""
        import torch
        from nnsight.intervention.backends.remote import RemoteBackend

        server = self

        class DoubleBackend(RemoteBackend):
            def request(self, request, tracer):
                data = server.ask(self._serialize(tracer), self.compress)
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)

        return DoubleBackend("double", host="http://double.invalid", env=model._remoteable_get_env())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()
