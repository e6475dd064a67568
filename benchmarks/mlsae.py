"""Multi-layer SAEs: layer statistics against the dense way and by length of text, training against sae_lens on stored rows and the authors.

CPU times are of one thread; what is compared takes turns, and medians of the ratios of each turn are reported. Prints one JSON object and
writes benchmarks/results/mlsae.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

LAYERS, TOKENS, LATENTS, K = 12, 2048, 8192, 32


def codes() -> tuple[torch.Tensor, torch.Tensor]:
    """Random sparse codes, (layers, tokens, k)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.stack([torch.randperm(LATENTS, generator=generator)[:K] for _ in range(LAYERS * TOKENS)]).view(LAYERS, TOKENS, K)
    latents[1:] = torch.where(torch.rand(LAYERS - 1, TOKENS, 1, generator=generator) < 0.6, latents[:1], latents[1:])
    return torch.rand(LAYERS, TOKENS, K, generator=generator) + 0.1, latents


def dense(values: torch.Tensor, latents: torch.Tensor) -> float:
    """Var(L), E[Var(L|F)] and E[Var(L|F,T)] as the published formulas say, with a tensor of layers, tokens and latents."""
    a = torch.zeros(LAYERS, TOKENS, LATENTS).scatter_(-1, latents, values)
    counts, totals = (a > 0).sum(1), a.sum(1)
    p = (a / a.sum(0)).nan_to_num_(0.0)
    layer = torch.arange(LAYERS, dtype=torch.float32)

    def variance(q: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(layer.square(), q, 1) - torch.tensordot(layer, q, 1).square()

    found = variance(p.mean((1, 2))), variance(p.mean(1)).mean(), variance(p).mean()
    return float(found[1] / found[2]) + 0 * float(counts.sum() + totals.sum())


def sparse(values: torch.Tensor, latents: torch.Tensor) -> float:
    """The same and more, from `LayerStats`."""
    from nnato.layer_stats import LayerStats, layer_variance

    stats = LayerStats(range(LAYERS), LATENTS)
    stats.add(values, latents)
    return layer_variance(stats, "published").ratio


def resident(name: str) -> float:
    """Resident memory of this process, in MB, as Linux calls it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def one_way(name: str) -> dict[str, float]:
    """CPU seconds and additional memory (MB) of one way, in a process of its own."""
    torch.set_num_threads(1)
    values, latents = codes()
    way = {"dense": dense, "sparse": sparse}[name]
    if name == "sparse":
        import nnato.layer_stats  # noqa: F401 - not part of what is measured
    ctypes.CDLL(None).malloc_trim(0)  # memory that making codes left behind would hide what is measured
    Path("/proc/self/clear_refs").write_text("5")  # and its peak is forgotten
    before = resident("VmRSS")
    started = time.process_time()
    ratio = way(values, latents)
    spent = time.process_time() - started
    return {"cpu_s": spent, "memory_mb": resident("VmHWM") - before, "ratio": ratio}


def in_a_process(way: str) -> dict[str, Any]:
    """What a way measures in a process of its own."""
    command = [sys.executable, __file__, "--way", way]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def statistics_of_layers(turns: int) -> dict[str, object]:
    """Both ways in turn."""
    runs: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
    for _ in range(turns):
        for name, found in runs.items():
            found.append(in_a_process(name))
    pairs = list(zip(runs["dense"], runs["sparse"], strict=True))
    return {
        "shape": {"layers": LAYERS, "tokens": TOKENS, "latents": LATENTS, "k": K},
        "runs": runs,
        "sums_mb": 8 * LATENTS * (7 * LAYERS + 2) / 1e6,
        "cpu_ratio": statistics.median(one["cpu_s"] / other["cpu_s"] for one, other in pairs),
        "memory_ratio": statistics.median(one["memory_mb"] / max(other["memory_mb"], 0.1) for one, other in pairs),
        "same_number": max(abs(one["ratio"] / other["ratio"] - 1) for one, other in pairs),
    }


def flat(tokens: int = 1_000_000) -> dict[str, object]:
    """Resident memory of layer statistics after each tenth of some tokens: encoding, sums and errors as in a real pass.

    Residuals are random and made anew for each batch, so a model's own memory is not in the way.
    """
    import gc

    from nnato.dictionaries import Dictionary
    from nnato.multilayer import LayerStatistic, MultiLayerSAE
    from nnato.sites import ResidualSite
    from nnato.statistics import ResidualBatch

    torch.set_num_threads(1)
    layers, width, latents, k, blocks, positions = 4, 32, 512, 8, 8, 256
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(latents, width, generator=generator), dim=1)
    zero = torch.zeros(width)
    dictionary = Dictionary("topk", decoder.T.contiguous(), torch.zeros(latents), decoder, zero, zero, "layer_norm", k=k)
    sites = tuple(map(ResidualSite, range(layers)))
    statistic = LayerStatistic(MultiLayerSAE(dictionary, sites), width)
    ordinary = torch.ones(blocks, positions, dtype=torch.bool)
    documents = torch.arange(blocks)
    batches = tokens // (blocks * positions)
    found = {}
    for number in range(1, batches + 1):
        x = torch.randn(layers, blocks, positions, width, generator=generator).cumsum(0)
        statistic.update(ResidualBatch(x, sites, ordinary, ~ordinary, documents, "test", 5 * (number - 1) // batches))
        if number % (batches // 10) == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator only keeps for later does not count
            found[number * blocks * positions] = resident("VmRSS")
    shape = {"layers": layers, "d_model": width, "latents": latents, "k": k}
    return {"shape": shape, "resident_mb": found, "ratio": list(found.values())[-1] / next(iter(found.values()))}


def training(name: str, tokens: int, turns: int) -> dict[str, object]:
    """Training on the stream against sae_lens' trainer on stored rows, and against the authors' recipe on the same rows."""
    from nnato.accumulation import tokenize
    from nnato.models import describe, load_model
    from nnato.reduction import capture
    from nnato.sae_training import Recipe, _Rows, _Training, default_corpus
    from nnato.sites import ResidualSite

    torch.set_num_threads(1)
    model = load_model(name)
    info = describe(model)
    sites = tuple(map(ResidualSite, range(info.blocks)))
    recipe = Recipe(expansion=4, k=32, tokens=tokens, rows=512, buffer=8192, lr=1e-3)
    blocks = tokenize(model, default_corpus(recipe)).only("train")
    device = torch.device("cpu")

    stored, held = [], []
    source = _Rows(model, blocks, sites, recipe, None, 8)
    while sum(len(part) for part in stored) < tokens * len(sites):
        stored.append(source.fill())
    held = source.fill()[:4096]
    rows = torch.cat(stored)[: tokens * len(sites) // recipe.rows * recipe.rows]  # as many steps for all

    def streamed() -> tuple[float, object]:
        feed, trainer = _Rows(model, blocks, sites, recipe, None, 8), _Training(recipe, info.d_model, sites, device)
        started = time.process_time()
        while not trainer.finished:
            trainer.learn(feed.fill(), feed.fresh)
        spent = time.process_time() - started
        started = time.process_time()
        for number in range(feed.cursor):
            capture(model, blocks.batch(feed.plan[number % len(feed.plan)]).ids, sites)
        return spent - (time.process_time() - started), trainer.sae

    def from_storage() -> tuple[float, object]:
        from sae_lens.training.mixing_buffer import mixing_buffer
        from sae_lens.training.sae_trainer import SAETrainer

        made = _Training(recipe, info.d_model, sites, device)

        def forever() -> object:
            while True:
                yield from rows.split(8192)

        torch.manual_seed(0)
        provider = mixing_buffer(recipe.buffer, recipe.rows, forever(), 0.5)
        trainer = SAETrainer(made.trainer.cfg, made.sae, provider)
        started = time.process_time()
        trainer.fit()
        return time.process_time() - started, made.sae

    pairs, errors = [], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(turns):
            ours, sae = streamed()
            theirs, other = from_storage()
            pairs.append({"stream_less_forward_s": ours, "stored_s": theirs})
            errors = {"nnato": _fvu(sae, held), "sae_lens_stored": _fvu(other, held)}
    for whose, rate in (("authors", 1e-4), ("authors, at our rate", recipe.lr or 1e-3)):
        errors[whose] = by_authors(rows, held, recipe.expansion * info.d_model, recipe.k, recipe.rows, rate)
    return {
        "model": info.name,
        "sites": [int(site) for site in sites],
        "rows": len(rows),
        "steps": len(rows) // recipe.rows,
        "pairs": pairs,
        "speed": statistics.median(pair["stored_s"] / pair["stream_less_forward_s"] for pair in pairs),
        "fvu_held_out": errors,
    }


@torch.no_grad()
def _fvu(sae: object, rows: torch.Tensor) -> float:
    error = sae.decode(sae.encode(rows)) - rows  # type: ignore[attr-defined]
    return float(error.square().sum() / (rows - rows.mean(0)).square().sum())


def by_authors(rows: torch.Tensor, held: torch.Tensor, latents: int, k: int, batch: int, lr: float) -> float:
    """The published recipe on standardised rows, as their code trains: no encoder bias, tied start, hard renormalisation, Adam.

    Their learning rate is 1e-4 throughout, meant for thousands of steps; ours has a warm-up and a decay.
    Dead latents do not occur in so few steps, so there is no auxiliary loss.
    """
    from nnato.sae_training import geometric_median

    torch.manual_seed(0)
    encoder = torch.nn.Linear(rows.shape[1], latents, bias=False).weight.detach()
    decoder = torch.nn.functional.normalize(encoder.T.clone(), dim=0)
    bias = geometric_median(rows[: 2 * batch]).float()
    parameters = [tensor.requires_grad_() for tensor in (encoder, decoder, bias)]
    optimizer = torch.optim.Adam(parameters, lr=lr, eps=6.25e-10)

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        values, chosen = ((x - bias) @ encoder.T).topk(k, dim=-1, sorted=False)
        return torch.zeros(len(x), latents).scatter(-1, chosen, values.relu()) @ decoder.T + bias

    for x in rows.split(batch):
        if len(x) < batch:
            break
        loss = (reconstruct(x) - x).square().mean() / x.var()
        loss.backward()
        with torch.no_grad():
            decoder /= decoder.norm(dim=0)
            decoder.grad -= (decoder.grad * decoder).sum(0) * decoder
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((reconstruct(held) - held).square().sum() / (held - held.mean(0)).square().sum())


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=["dense", "sparse", "flat"], help="only this, in this process, and print it")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=4096, help="each is a row at every layer")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(flat() if arguments.way == "flat" else one_way(arguments.way)))
        return
    from common import publish  # here, so that the ways that are timed start without nnato

    record = {
        "layer_statistics": statistics_of_layers(5),
        "memory": in_a_process("flat"),
        "training": training(arguments.model, arguments.tokens, arguments.turns),
    }
    publish("mlsae", record)


if __name__ == "__main__":
    main()
