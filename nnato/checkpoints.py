"""Checkpoints of a run: one file that is written over and over, the one before it beside it, one process at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nnato.errors import FileFormatError
from nnato.storage import Metadata, exclusive, read_artifact, remove_orphans, write_artifact


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its state.

    Attributes:
        file: The last checkpoint; at the end the result.
        kind: What the file holds.
    """

    file: Path
    kind: str

    @property
    def previous(self) -> Path:
        """Where the last checkpoint but one is, until the run ends."""
        return self.file.with_stem(f"{self.file.stem}.previous")

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes away while the run goes on.

        Raises:
            OutputError: Another process works on the file, or its folder cannot be written to.
        """
        return exclusive(self.file)

    def read(self) -> tuple[dict[str, torch.Tensor], Metadata] | None:
        """The last checkpoint that can be read, None if there are none. A damaged one is warned about, and the one before it taken.

        Raises:
            FileFormatError: There are some, and none can be read.
        """
        if not self.file.exists():  # a process killed just between moving the old one and putting the new one there leaves the old one
            return read_artifact(self.previous, self.kind) if self.previous.exists() else None
        try:
            return read_artifact(self.file, self.kind)
        except FileFormatError as damage:
            if not self.previous.exists():
                raise
            found = read_artifact(self.previous, self.kind)
            warnings.warn(f"{damage}. Going on from the checkpoint before it, {self.previous.name}", stacklevel=3)
            return found

    def write(self, tensors: Mapping[str, torch.Tensor], metadata: Metadata) -> None:
        """Write a checkpoint, durably.

        Raises:
            OutputError: It cannot be written; those that were there are kept.
        """
        write_artifact(self.file, self.kind, tensors, metadata, keep=self.previous)

    def finish(self) -> None:
        """Remove the checkpoint before the last one, and what a process left that was killed just before it could do so."""
        if self.previous.exists():
            self.previous.unlink(missing_ok=True)
        remove_orphans(self.file)
