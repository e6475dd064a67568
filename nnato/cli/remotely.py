"""Options that run a model on a server."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from nnato.cli.common import note, options

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel
    from nnato.remote import NdifServer, Server

remote_options = options(
    click.option("--remote", is_flag=True, help="Run the model on an NDIF server; only sums and losses come back."),
    click.option("--host", help="Its URL.  [default: NDIF_HOST, or nnsight's configuration, or the public one]"),
    click.option("--timeout", type=click.FloatRange(min=0), default=3600.0, show_default=True, help="Seconds a job may take."),
    click.option("--resume-job", help="Attach to the job with this id, sent earlier by the same command, instead of sending it again."),
    click.option("--dry-run-remote", is_flag=True, help="Run what --remote would send in a fresh process here, without nnato."),
)


@dataclasses.dataclass(frozen=True)
class RemoteOptions:
    """What --remote and its companions say."""

    remote: bool
    dry_run_remote: bool
    host: str | None
    timeout: float
    resume_job: str | None
    dtype: str

    @property
    def on(self) -> bool:
        """Whether the model runs elsewhere."""
        return self.remote or self.dry_run_remote

    def check(self) -> NdifServer | None:
        """Refuse what does not go together; with --remote, the server, which has said that it is there.

        Raises:
            RemoteError: Options that do not go together, no key, or no server.
        """
        from nnato.errors import RemoteError

        if self.remote and self.dry_run_remote:
            raise RemoteError("give --remote or --dry-run-remote, not both")
        if not self.remote and (self.host is not None or self.resume_job is not None):
            raise RemoteError("--host and --resume-job belong to --remote")
        if not self.remote:
            return None
        from nnato.remote import NdifServer

        server = NdifServer(self.host, timeout=self.timeout, resume=self.resume_job, say=note)
        server.check()
        return server

    @contextlib.contextmanager
    def open(self, server: NdifServer | None, model: TransformersModel) -> Iterator[Server | None]:
        """Where jobs of a model go: the server, a dry run that ends with the block, or None for this process."""
        if not self.dry_run_remote:
            yield server
            return
        import torch

        from nnato.dry_run import DryRunServer

        note("dry run: a fresh process without nnato loads the weights and executes what a server would be sent")
        with DryRunServer(model.repo_id, getattr(torch, self.dtype), say=note) as dry:
            yield dry


def take_remote_options(values: dict[str, Any], dtype: str) -> RemoteOptions:
    """Take the values of `remote_options` out of a command's keyword arguments."""
    names = ("remote", "dry_run_remote", "host", "timeout", "resume_job")
    return RemoteOptions(**{name: values.pop(name) for name in names}, dtype=dtype)
