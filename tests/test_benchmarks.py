"""The summary of benchmarks: which ratios count, and what is shown as a regression. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from summary import SOURCES, Row, here, rows  # noqa: E402


def test_every_result_in_the_repository_is_in_the_summary():
    found = rows(here)
    assert len(found) >= 20
    assert all(row.value > 0 for row in found.values())
    for name, ways in SOURCES.items():
        if text := here(f"{name}.json"):
            assert list(ways(json.loads(text))), name


@pytest.mark.parametrize(
    ("lower", "before", "now", "worse"),
    [(True, 1.0, 1.19, False), (True, 1.0, 1.21, True), (False, 1.2, 1.01, False), (False, 1.2, 0.99, True), (None, 1.0, 9.0, False)],
)
def test_a_loss_of_more_than_a_fifth_is_a_regression(lower, before, now, worse):
    assert Row("x", now, None, lower).worse_than(Row("x", before, None, lower)) is worse
    assert Row("x", 1.0, 1.05, True).reached
    assert not Row("x", 0.7, 0.8, False).reached
    assert Row("x", 1.0, None, True).reached is None


def test_the_command_ends_with_one_on_a_regression(tmp_path):
    """In a repository of its own, with a result that became worse."""
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (folder / "summary.py").write_text((BENCHMARKS / "summary.py").read_text())
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]

    def measured(ratio):
        record = {"model": "smollm2", "ratio": ratio}
        (folder / "results" / "ablation.json").write_text(json.dumps(record))
        forward = {"one_pair": {"nnato": {"ratio": 1.01}}, "all_pairs": {}, "sums_of_one_pair": {}, "gram": {}, "model": "x"}
        forward["processes_cpu_s"] = {"python": 0.01, "import nnato": 0.05, "nnato --help": 0.1}
        (folder / "results" / "accumulation.json").write_text(json.dumps(forward))

    def compare():
        return subprocess.run([sys.executable, "summary.py", "--compare", "HEAD"], cwd=folder, capture_output=True, text=True)

    measured(3.0)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    assert compare().returncode == 0
    measured(2.0)
    ended = compare()
    assert ended.returncode == 1
    assert "1 ratios are worse by more than 20 %: ablation of smollm2" in ended.stderr
    assert len(json.loads((folder / "results" / "summary.json").read_text())) == 4
    assert (tmp_path / "docs" / "images" / "benchmarks.png").stat().st_size > 1000
