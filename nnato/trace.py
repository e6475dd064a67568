"""`ATOTrace`: read, save and patch residuals inside one nnsight trace. With `dry_run`, the only file that touches nnsight's inner parts.

How it works. nnsight runs the block of a trace as a worker (a greenlet) beside the forward pass, and a worker can only wait for places
the model has not passed. So every read and every edit gets a worker of its own, started from the block and placed before it in the
interleaver's list. Workers parked at one place are served in list order: what is read before a patch is unpatched, what is read after
it is patched, as the code reads, and sites may be named in any order until a value is used.

In generation the model makes one pass per token: the worker of an edit goes on to the next pass, until none comes.

The class is written so that nnsight can ship it to a server by value: no zero-argument `super()`, no dataclasses, no imports inside
methods. Private names of nnsight used here (`Mediator`, `_reindex_parked`, `Mediator.pending`, `_batch_size`, `_batcher_class`, …)
are those of nnsight 0.8; `tests/test_trace.py` holds them to it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch

from nnato.blocks import find_blocks, find_head
from nnato.errors import ActivationError, OperatorError, SiteError
from nnato.nnsight_setup import (
    InterleavingTracer,
    Iterations,
    Mediator,
    OutOfOrderError,
    Tracer,
    TransformersModel,
    _saves,
    clear_shared_locals,
    mark,
    push,
    push_result,
    save,
)
from nnato.passes import Passes, Positions
from nnato.residuals import Residual, current_worker, has_residual, plain
from nnato.sites import ResidualSite

__all__ = ["ATOTrace", "Edit", "Residual", "TransformersModel", "save"]

_ACT = "self._act(call)"  # what the worker of an edit runs


class ATOTrace(InterleavingTracer):  # type: ignore[misc]
    """Reads and edits of residuals in one forward pass, or several.

    With a prompt, the block runs beside one forward pass::

        with ATOTrace(model, "The Eiffel Tower is in") as t:
            x = t.residual(5).save()
            t.patch(10, operator(t.residual(5)), positions=[3])
            logits = t.logits.save()

    Without one, the block is ordinary code that makes its own passes with `t.run`, or one batch out of `t.invoke` blocks::

        with ATOTrace(model) as t:
            results = nnsight.save([t.run(prompt, read=[5]) for prompt in prompts])

    All of nnsight's idioms (`.save()`, other modules of the model, `t.stop()`) work inside. Interventions asked for before the block, or in
    a block without a prompt, act on every pass in it.

    With `max_new_tokens`, the model generates, and interventions act at every step::

        with ATOTrace(model, "The Eiffel Tower is in", max_new_tokens=10) as t:
            t.transport(operator, positions=slice(-1, None))  # the prompt's last token, and every new one
            ids = t.result.save()

    Positions then name tokens of the whole sequence: from 0 at the left of the padded prompt on through what is generated, negative ones
    from the prompt's end. A token is edited in the pass that processes it. `residual` and `logits` are those of the first step; in a loop
    over `t.iter[:]` they are those of its step, reads and edits are carried out in the order written, and positions count within the step.

    Args:
        model: What `load_model` returned, or any nnsight `TransformersModel`.
        inputs: A prompt, prompts, or token ids, as nnsight takes them. Several prompts are padded on the left.
        max_new_tokens: Generate up to so many tokens, instead of one forward pass; `t.result` is then the ids, prompt included.
        remote: False to run here; True, "local" or a URL as in nnsight's `trace`. What goes wrong is raised as `RemoteError`.
        backend: An nnsight backend to run the block instead, e.g. one of a `DryRunServer`.
        forward: Keyword arguments of the model's forward or `generate`, e.g. `input_ids=`, `use_cache=False`.
    """

    def __init__(
        self,
        model: TransformersModel,
        *inputs: Any,
        max_new_tokens: int | None = None,
        remote: bool | str = False,
        backend: Any = None,
        **forward: Any,
    ) -> None:
        if backend is None and remote:
            from nnato.remote import live_backend  # never on a server: what a class names at the top travels with it

            backend = live_backend(model, remote)
        call = model._call
        if max_new_tokens is not None:
            call, forward["max_new_tokens"] = model.generate, max_new_tokens
        InterleavingTracer.__init__(self, model, call, *inputs, backend=backend, **forward)
        self.blocks_path, self.n_blocks, _ = find_blocks(model._module)
        self.queue: list[tuple[str, tuple[Any, ...]]] = []
        self.max_new_tokens = max_new_tokens
        self.repeats = max_new_tokens is not None  # whether edits go on from pass to pass
        self.in_order = False  # whether calls in the block are carried out where they stand
        self.ran = False

    # ---- reading -------------------------------------------------------------------------------------------------------

    def residual(self, site: int | str | ResidualSite) -> torch.Tensor:
        """The residual at a site, (batch, positions, d_model) in the model's dtype; waits for the model only when it is used.

        Raises:
            SiteError: The model has no such site, or no forward pass is running.
            OutOfOrderError: A value from behind this site was already used in the block.
        """
        asked = Residual.ask(self, ResidualSite.parse(site, self.n_blocks))
        if self.in_order or self._standing_at(asked.site):
            asked.wait()
        else:
            self._start("asked.value = self._read(asked.site)", [asked.site], asked=asked)
        return asked

    @property
    def logits(self) -> torch.Tensor:
        """The model's logits, (batch, positions, vocabulary), after any final soft-cap; waits for the end of the pass."""
        logits: torch.Tensor = self.envoy.output.logits
        return logits

    @property
    def iter(self) -> Iterations:
        """Steps of a generation to loop over, as nnsight's; from here on, reads and edits are carried out in the order written."""
        self.in_order = True
        return InterleavingTracer.iter.fget(self)

    # ---- editing -------------------------------------------------------------------------------------------------------

    def patch(self, site: int | str | ResidualSite, value: Any, positions: Positions = None) -> None:
        """Replace the residual at some positions of a site.

        Args:
            site: Where.
            value: A number; a tensor that broadcasts to (batch, chosen positions, d_model), or has all positions; a residual of this trace;
                or a function of the current residual, whole, giving one of these.
            positions: Which token positions; all by default. They count from the left of the padded batch, negative ones from its end.

        Raises:
            SiteError: The model has no such site.
            PositionError: A position lies outside the sequence.
            OutOfOrderError: A value from behind this site was already used in the block.
        """
        self._edit("_patch", [ResidualSite.parse(site, self.n_blocks)], value, positions)

    def transport(
        self,
        operator: Callable[[torch.Tensor], torch.Tensor] | None,
        source: int | str | ResidualSite | None = None,
        target: int | str | ResidualSite | None = None,
        positions: Positions = None,
    ) -> None:
        """Replace the residual at `target` by `operator` of the residual at `source` of the same pass and positions.

        Args:
            operator: A map of (…, d_model) to (…, d_model), e.g. a `TransportOperator`; None is the identity.
            source: Where it reads; by default the operator's own source.
            target: Where it writes; behind `source`; by default the operator's own target.
            positions: As in `patch`.

        Raises:
            SiteError: A site does not exist or is not given, or the source lies behind the target.
            PositionError: A position lies outside the sequence.
            OutOfOrderError: A value from behind a site was already used in the block.
        """
        source = getattr(operator, "source", None) if source is None else source
        target = getattr(operator, "target", None) if target is None else target
        if source is None or target is None:
            raise SiteError("transport needs a source and a target: this operator names none, so give them")
        sites = [ResidualSite.parse(source, self.n_blocks), ResidualSite.parse(target, self.n_blocks)]
        if sites[0] > sites[1]:
            raise SiteError(f"transport {sites[0]}:{sites[1]}: the source must not lie behind the target")
        self._edit("_transport", sites, operator, positions)

    def identity(self, source: int | str | ResidualSite, target: int | str | ResidualSite, positions: Positions = None) -> None:
        """Replace the residual at `target` by the one at `source`, as `transport` does without a map."""
        self.transport(None, source, target, positions)

    def zero(self, site: int | str | ResidualSite, positions: Positions = None) -> None:
        """Replace the residual at some positions of a site by zero, as `patch` does."""
        self.patch(site, 0.0, positions)

    def mean(self, site: int | str | ResidualSite, mean: Any, positions: Positions = None) -> None:
        """Replace the residual at some positions of a site by a mean residual.

        Args:
            site: Where.
            mean: The mean, float (d_model,), or a `TransportOperator` from or to this site, which knows that of its training tokens.
            positions: As in `patch`.

        Raises:
            OperatorError: It holds no mean of this site.
            SiteError: The model has no such site.
            PositionError: A position lies outside the sequence.
            OutOfOrderError: A value from behind this site was already used in the block.
        """
        at = ResidualSite.parse(site, self.n_blocks)
        if not isinstance(mean, torch.Tensor):
            known = {getattr(mean, end, None): getattr(mean, f"{end}_mean", None) for end in ("source", "target")}
            if known.get(at) is None:
                raise OperatorError(f"no mean of site {at}: give a tensor (d_model,), or an operator from or to that site")
            mean = known[at]
        self.patch(at, mean, positions)

    def resume(self, site: int | str | ResidualSite, value: torch.Tensor) -> None:
        """Start the forward pass behind `site`: its residual is `value`, and the blocks up to it do not run.

        The result is that of a full pass in which the residual at `site` was `value`, since a block reads nothing else of the earlier ones.

        Args:
            site: A block (not `embed`).
            value: (batch, positions, d_model).

        Raises:
            SiteError: The block does not exist, or is `embed`.
            ValueError: The trace generates.
        """
        if self.repeats:
            raise ValueError("resume starts one forward pass: it cannot be used in generation")
        last = ResidualSite.parse(site, self.n_blocks)
        if last < 0:
            raise SiteError("resume from 'embed' would skip nothing: use patch('embed', …)")
        self._edit("_resume", [ResidualSite.EMBED, last], value)

    def skip_after(self, site: int | str | ResidualSite) -> None:
        """Let no block behind `site` run, when nothing behind it matters. Unlike `t.stop()` it also works in every job of a server.

        The rest of the model (final norm, head) sees the residual at `site`.

        Raises:
            SiteError: The model has no such site.
        """
        last = ResidualSite.parse(site, self.n_blocks)
        if last < self.n_blocks - 1:
            self._edit("_skip_after", [last])

    def skip_head(self) -> None:
        """Let the language-model head not run, when nobody reads the logits: with a large vocabulary it costs as much as many blocks."""
        self._edit("_skip_head", [ResidualSite(self.n_blocks - 1)])

    def persist(self) -> Edit:
        """Make the interventions asked for so far act on every later trace and generation of the model, until removed.

        In use::

            t = ATOTrace(model)
            t.transport(operator)
            with t.persist():
                ...  # here the model is edited, and no longer behind it, whatever happened

        They act through nnsight, so not where the bare module is called. A number among the positions must lie within the prompt.

        Raises:
            ValueError: Nothing was asked for, or `resume`, or the trace has run.
        """
        if self.envoy is None or not self.queue:
            raise ValueError("persist keeps what was asked for on a trace that has not run: call for example t.transport(operator) first")
        if any(method == "_resume" for method, _ in self.queue):
            raise ValueError("resume starts one forward pass: it cannot persist")
        kept = ATOTrace(self.envoy)
        kept.repeats = True
        node = ast.parse(f"with _:\n {_ACT}").body[0]  # the form in which nnsight ships an edit together with its model
        workers = [
            Mediator(compile(_ACT, "<nnato>", "exec"), {}, {"self": kept, "call": call}, copy=True, node=node) for call in self.queue
        ]
        self.queue = []
        return Edit(kept.envoy, workers)

    def _edit(self, method: str, sites: list[ResidualSite], *arguments: Any) -> None:
        call = (method, (*sites, *arguments))
        me = current_worker()
        if me is None:
            self.queue.append(call)
        elif self.in_order or (self._standing_at(sites[0]) and len(sites) == 1 and not self.repeats):
            self._do(call, Passes())
        elif self.repeats and me.pending is not None:
            raise OutOfOrderError("in generation, ask for edits before a value is used, or within a loop over t.iter")
        else:
            self._start(_ACT, sites, call=call)

    def _act(self, call: tuple[str, tuple[Any, ...]]) -> None:
        """Carry out an edit: in one pass, or in every pass that comes."""
        passes = Passes()
        if not self.repeats:
            self._do(call, passes)
            return
        passes.expected = self.max_new_tokens
        while True:
            current_worker().iteration = passes.number
            try:
                self._do(call, passes)
            except OutOfOrderError:
                if passes.number == 0 and passes.expected is not None:
                    raise
                return  # no pass came any more; or one that stopped early, before a persistent edit
            passes.number += 1

    def _do(self, call: tuple[str, tuple[Any, ...]], passes: Passes) -> None:
        getattr(self, call[0])(passes, *call[1])

    def _patch(self, passes: Passes, site: ResidualSite, value: Any, positions: Positions) -> None:
        old = self._read(site)
        new = plain(value)
        self._write(passes, site, old, new(old) if callable(new) else new, positions)

    def _transport(self, passes: Passes, source: ResidualSite, target: ResidualSite, operator: Any, positions: Positions) -> None:
        x = self._read(source)
        if operator is not None:
            # A server may run the block under autocast; switch it off around the mathematics, never around a read.
            with torch.autocast(device_type=x.device.type, enabled=False):
                x = operator(x)
        self._write(passes, target, self._read(target), x, positions)

    def _resume(self, _: Passes, first: ResidualSite, last: ResidualSite, value: torch.Tensor) -> None:
        value = value.to(self._read(first))
        for block in range(last + 1):
            self._block(ResidualSite(block)).skip(value)

    def _skip_after(self, _: Passes, last: ResidualSite) -> None:
        value = self._read(last)
        for block in range(last + 1, self.n_blocks):
            self._block(ResidualSite(block)).skip(value)

    def _skip_head(self, _: Passes, __: ResidualSite) -> None:
        self.envoy.get(find_head(self.envoy._module)).skip(torch.zeros(1, 1, 1))

    # ---- the model -----------------------------------------------------------------------------------------------------

    def _block(self, site: ResidualSite) -> Any:
        return self.envoy.get(self.blocks_path)[max(int(site), 0)]

    def _location(self, site: ResidualSite) -> str:
        return str(self._block(site).path) + (".input" if site < 0 else ".output")

    def _read(self, site: ResidualSite) -> torch.Tensor:
        block = self._block(site)
        value = block.input if site < 0 else block.output
        found: torch.Tensor = value[0] if isinstance(value, tuple) else value
        return found

    def _write(self, passes: Passes, site: ResidualSite, old: torch.Tensor, new: Any, positions: Positions) -> None:
        length = old.shape[1]
        at, among = passes.locate(positions, length)
        if not at:
            return
        edited = old.clone()
        if isinstance(new, torch.Tensor):
            new = new.to(edited)
            if new.dim() == 3 and new.shape[1] == length:
                new = new[:, at]
            elif among and new.dim() > 1 and new.shape[-2] == len(among):
                new = new[..., [place for place, here in enumerate(among) if here], :]
            room = edited[:, at].shape
            if new.dim() > 3 or any(size not in (1, there) for size, there in zip(new.shape[::-1], room[::-1], strict=False)):
                step = "" if passes.number == 0 else f" at step {passes.number}; transport reads anew at every step"
                raise ActivationError(f"a value of shape {tuple(new.shape)} does not fit {tuple(room)} at site {site}{step}")
        edited[:, at] = new
        block = self._block(site)
        if site < 0:
            block.input = edited
        elif isinstance(block.output, tuple):
            block.output = (edited, *block.output[1:])
        else:
            block.output = edited

    # ---- workers -------------------------------------------------------------------------------------------------------

    def _standing_at(self, site: ResidualSite) -> bool:
        """Whether the block just used this residual, so that the model still waits there."""
        me = current_worker()
        return me is not None and me.pending is not None and me.pending.provider == self._location(site)

    def _start(self, code: str, sites: list[ResidualSite], **names: Any) -> None:
        """Start a worker from inside the block, ahead of the block in the list and scoped to the same rows."""
        me, interleaver = current_worker(), self.envoy.interleaver
        if me is None:
            raise SiteError("a residual can only be read during a forward pass: give ATOTrace a prompt, or use t.run or t.invoke")
        for site in sites:
            if me.occurrence(self._location(site)) > 0:
                raise OutOfOrderError(f"site {site} has already passed: a value from behind it was used before this line")
        if me.pending is not None and type(interleaver).__name__ == "IPCInterleaver":
            # The sandbox of a server knows workers by their number, so none can join once the pass has begun: do it here, as written.
            exec(code, {**names, "self": self})
            return
        worker = Mediator(compile(code, "<nnato>", "exec"), {}, {**names, "self": self})
        worker.batch_group = me.batch_group
        interleaver.mediators.insert([other is me for other in interleaver.mediators].index(True), worker)
        worker.start(interleaver)
        interleaver._reindex_parked()

    def _queued_workers(self) -> list[Mediator]:
        return [Mediator(compile(_ACT, "<nnato>", "exec"), {}, {"self": self, "call": call}) for call in self.queue]

    # ---- running -------------------------------------------------------------------------------------------------------

    def run(self, *inputs: Any, read: Iterable[int | str | ResidualSite] = (), **forward: Any) -> dict[str, Any]:
        """In a block without a prompt: one forward pass or generation, under the interventions asked for so far.

        Returns:
            A dictionary: `logits`, (batch, positions, vocabulary), or the `ids` of a generation, (batch, tokens), and `residuals`, by site
            as given, each (batch, positions, d_model).
        """
        if self.envoy.interleaver.mediators:
            raise ValueError("use t.run or t.invoke in one ATOTrace, not both")
        self.ran = True
        inner = ATOTrace(self.envoy, *inputs, **{**self.kwargs, **forward})
        inner.queue = self.queue
        with inner:
            residuals = {site: inner.residual(site) for site in read}
            output = inner.result if inner.repeats else inner.logits
        return {"ids" if inner.repeats else "logits": output, "residuals": residuals}

    def invoke(self, *inputs: Any, **forward: Any) -> Any:
        """One prompt of a batch, as nnsight's `invoke`. What was asked for before the first one acts on the whole batch."""
        if not self.envoy.interleaver.mediators:
            self.envoy.interleaver.mediators.extend(self._queued_workers())
        return InterleavingTracer.invoke(self, *inputs, **forward)

    def execute(self, code: CodeType) -> None:
        """Run the captured block; called by nnsight where the model is."""
        frame = self.info.frame
        if self.envoy._batch_size(*self.args, **self.kwargs):
            self.envoy.interleaver.mediators.extend(self._queued_workers())
            InterleavingTracer.execute(self, code)
        else:
            self._execute_without_prompt(code)
        # Residuals never leave the trace: the block's own names get plain tensors.
        found = {name: value for name, value in dict(frame.f_locals).items() if name in code.co_names and has_residual(value)}
        for name, value in found.items():
            tensors = plain(value)
            push(frame, {name: mark(tensors) if id(value) in _saves() else tensors})

    def _execute_without_prompt(self, code: CodeType) -> None:
        """Run the block as ordinary code, then the invokes it registered, as one batch.

        Not left to `InterleavingTracer.execute`: in nnsight 0.8.0, which servers run, it does not hand back names bound outside an invoke.
        """
        interleaver = self.envoy.interleaver
        self.batcher = self.envoy._batcher_class(self.envoy, self.kwargs)
        try:
            Tracer.execute(self, code)
            workers = list(interleaver.mediators)
            if workers:
                self.envoy.interleave(self.fn, batcher=self.batcher, **self.kwargs)
            elif not self.ran:
                raise ValueError("ATOTrace without a prompt needs t.run(prompt) or `with t.invoke(prompt):` inside its block")
            for worker in workers:
                push_result(self.info.frame, worker.lcls.writes() if hasattr(worker.lcls, "writes") else worker.lcls)
        finally:
            interleaver.cancel()
            clear_shared_locals()


class Edit:
    """Interventions that act on every trace of a model until `remove`, or the end of a `with` block. Made by `ATOTrace.persist`."""

    def __init__(self, model: TransformersModel, workers: list[Mediator]) -> None:
        self.model, self.workers = model, workers
        model._edits = [*model._edits, *workers]

    def remove(self) -> None:
        """Take them away; others stay."""
        self.model._edits = [worker for worker in self.model._edits if worker not in self.workers]

    def __enter__(self) -> Edit:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
