"""Jobs of the command line killed 240 times at random, and before every step of every write; nothing half is ever found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

KILLS = {"accumulate": 60, "fit": 120, "ablate": 20, "sae train": 20, "mlsae train": 20}


@pytest.mark.slow
def test_killed_jobs_leave_whole_files_and_go_on_to_the_same_result(saved_model, text, tmp_path):
    # In memory where that is possible: a kill does not ask whether a file has reached the disk, and thousands of fsyncs take their time.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as scratch:
        script = Path(__file__).with_name("crash.py")
        command = [sys.executable, str(script), str(saved_model), str(text), scratch, json.dumps(KILLS)]
        environment = {**os.environ, "NNATO_CACHE": str(tmp_path / "cache"), "MPLBACKEND": "agg"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert [record["job"] for record in records] == list(KILLS)
    for record in records:
        assert record["killed"] == KILLS[record["job"]]
        assert record["steps"] >= 4  # at least two files are written
        assert record["files_read"] > record["steps"]
        assert record["different"] == []
