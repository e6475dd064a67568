"""CPU time of `ATOTrace` (one transport, one read, the logits) against hand-written forward hooks that do the same, on the embedded model.

Paired: each repeat runs both ways in turn, in alternating order, and the ratio is taken within the repeat; the median of the ratios is
reported, with the smallest and the largest. Both ways must give equal logits. Prints one JSON object and writes
benchmarks/results/trace.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import publish

from nnato.blocks import find_blocks
from nnato.models import load_model
from nnato.operators import TransportOperator
from nnato.sites import ResidualSite
from nnato.trace import ATOTrace, TransformersModel

SOURCE, TARGET, READ, POSITIONS = 9, 12, 15, [3, 5]
SHAPES = ((1, 8), (1, 128))


def traced(model: TransformersModel, ids: torch.Tensor, operator: TransportOperator) -> tuple[torch.Tensor, torch.Tensor]:
    """With nnato."""
    with ATOTrace(model, input_ids=ids, use_cache=False) as t:
        t.transport(operator, positions=POSITIONS)
        x = t.residual(READ).save()
        logits = t.logits.save()
    return x, logits


def hooked(model: TransformersModel, ids: torch.Tensor, operator: TransportOperator) -> tuple[torch.Tensor, torch.Tensor]:
    """With three forward hooks."""
    module = model._module
    blocks, seen = module.get_submodule(find_blocks(module)[0]), {}

    def at_source(_: object, __: object, output: torch.Tensor) -> None:
        seen[SOURCE] = output

    def at_target(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        edited = output.clone()
        edited[:, POSITIONS] = operator(seen[SOURCE])[:, POSITIONS]
        return edited

    def at_read(_: object, __: object, output: torch.Tensor) -> None:
        seen[READ] = output

    handles = [blocks[block].register_forward_hook(hook) for block, hook in ((SOURCE, at_source), (TARGET, at_target), (READ, at_read))]
    try:
        logits = module(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen[READ], logits


def cpu_seconds(run: Callable[[], object], passes: int) -> float:
    """CPU time of so many passes."""
    start = time.process_time()
    for _ in range(passes):
        run()
    return (time.process_time() - start) / passes


@torch.no_grad()
def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(device="cpu")
    width = find_blocks(model._module)[2]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) / width for shape in ((width, width), (width,), (width,))]
    operator = TransportOperator(ResidualSite(SOURCE), ResidualSite(TARGET), *tensors)
    shapes = []
    for batch, length in SHAPES:
        ids = torch.randint(1000, 50_000, (batch, length), generator=generator)
        ways = (lambda ids=ids: traced(model, ids, operator), lambda ids=ids: hooked(model, ids, operator))
        (x, logits), (want, wanted) = (way() for way in ways)
        if not (torch.equal(x, want) and torch.equal(logits, wanted)):
            raise SystemExit("the two ways give different results")
        passes = max(1, 128 // (batch * length))
        pairs = []
        for repeat in range(arguments.repeats):
            order = ways if repeat % 2 == 0 else ways[::-1]
            times = [cpu_seconds(way, passes) for way in order]
            pairs.append(times if repeat % 2 == 0 else times[::-1])
        ratios = sorted(trace / hooks for trace, hooks in pairs)
        shapes.append(
            {
                "batch": batch,
                "tokens": length,
                "ratio": statistics.median(ratios),
                "ratio_smallest": ratios[0],
                "ratio_largest": ratios[-1],
                "milliseconds_trace": 1e3 * statistics.median(trace for trace, _ in pairs),
                "milliseconds_hooks": 1e3 * statistics.median(hooks for _, hooks in pairs),
            }
        )
    record = {"repeats": arguments.repeats, "threads": arguments.threads, "shapes": shapes}
    publish("trace", record)


if __name__ == "__main__":
    main()
