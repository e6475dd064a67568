"""What the benchmarks share: the CPU time of a call, and where results go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nnato.storage import provenance

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"


def cpu_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """CPU time of a call, in seconds, and what it returned."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def publish(name: str, record: dict[str, Any]) -> None:
    """Write a record with its provenance to results/{name}.json and print it."""
    record = record | {"provenance": provenance()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
