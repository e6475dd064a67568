"""Every loader against hostile files: one class of error, little time and memory, and no code run; with and without `python -O`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_module
from hostile import KINDS

from nnato.accumulation import accumulate
from nnato.models import wrap


@pytest.fixture(scope="module")
def stored(tokenizer, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    accumulate(wrap(make_module("gemma2"), tokenizer), corpus, [(0, 1)], out=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("optimise", [False, True], ids=["checks", "python -O"])
def test_hostile_files_are_refused(optimise, stored, tmp_path):
    for kind in ("moments", "part"):
        shutil.copytree(stored, tmp_path / kind)
    script = Path(__file__).with_name("hostile.py")
    run = subprocess.run(
        [sys.executable, *(["-O"] if optimise else []), str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    counts = Counter(record["kind"] for record in records)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 20
    assert [record for record in records if record["raised"] != "NnatoError" and not record["same"]] == []
    assert [record for record in records if record["seconds"] > 1 or record["grown_mb"] > 50 or record["canary"]] == []
