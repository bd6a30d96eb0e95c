"""The part of a tick that has no communication, replayed as CUDA graphs (`dsaux.run.cuda_graphs`). Used by the engine.

A small network on a fast GPU is bound by Python and by the launches of its kernels. Between two instructions that load,
send, receive, sum or step, the instructions of a tick are therefore captured once and then replayed; under `al`, with
one micro-batch, a stage in the middle has

    load | aux forward, forward | await | loss | post | backward | await | refresh | send | aux backward | sums, steps
    eager        graph            eager  graph  eager   graph      eager   graph     eager     graph         eager

in the very order of the schedule, with the engine's own methods: there is no second set of formulas. The sums and both
optimizer steps are not captured, so that clipping and skipped steps are as without graphs, and a learning rate needs no
tensor on the device. What the graphs read and write is in `dsaux.tick_graph`, CUDA's side in `dsaux.graph_capture`.

A layer whose Python decides anew in every step must not be captured: it decides once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from dsaux.graph_capture import Capture, CudaCapture
from dsaux.schedules import instructions as ins
from dsaux.tick_graph import CAPTURED, Batch, TickGraph, cuts_of, record_tick
from dsaux.watch_rules import headline

if TYPE_CHECKING:
    from dsaux.local_step import LocalStepEngine

WARMUP_TICKS = 3
"""Ticks of one form that run eagerly before it is captured: lazy initialisations, the choice of algorithms."""
MOST_FORMS = 4
"""Forms of a tick that are captured: each has its own copy of a batch and of the gradients."""
_EXACT = (ins.ForwardPass, ins.BackwardPass)

_Form = tuple[Any, ...]


class StageGraphs:
    """Runs the ticks of one engine: the first ones of a form eagerly, then as graphs.

    Args:
        engine: the engine.
        capture: makes the graphs; None where the device has none.

    Attributes:
        graphs: those that were captured, by the form of the tick.
        tell: is given a sentence where ticks run eagerly for a reason that stays; by default it goes to the log.
    """

    def __init__(self, engine: LocalStepEngine, capture: Capture | None) -> None:
        self._engine, self._capture = engine, capture
        self.tell: Callable[[str], None] = logging.getLogger("dsaux").warning
        self._told: set[str] = set()
        self._failure: str | None = None
        self.drop()

    def drop(self) -> None:
        """Forget all graphs, and free their memory: the ticks that follow are of another kind."""
        self.graphs: dict[_Form, TickGraph] = {}
        self._warm: defaultdict[_Form, int] = defaultdict(int)
        self._cuts: defaultdict[_Form, set[int]] = defaultdict(set)

    def run(self, schedule: Any, eagerly: Callable[[], None]) -> None:
        """Run a schedule.

        Args:
            schedule: of DeepSpeed or of this project.
            eagerly: runs it without graphs.
        """
        instructions = [instruction for step in schedule.steps() for instruction in step]
        reason = self._why_eager(instructions)
        if reason is not None:
            self._tell_once(reason)
        if reason is not None or not any(isinstance(instruction, CAPTURED) for instruction in instructions):
            eagerly()
            return
        assert self._capture is not None, "without one there is a reason"
        # Their shapes decide, so all are loaded before the first instruction.
        loads = sum(isinstance(instruction, ins.LoadReplicaBatch) for instruction in instructions)
        batches = self._engine.load_ahead(loads)
        graph = self._graph_of(instructions, batches, self._capture)
        if graph is not None:
            self._engine.loaded_batches.clear()
            graph.replay(self._engine, instructions, batches)
            return
        batches.clear()
        with self._capture.warm_up():
            eagerly()

    def _why_eager(self, instructions: Sequence[Any]) -> str | None:
        """Why this schedule does not run as graphs; None also where it has nothing to capture."""
        engine = self._engine
        if self._capture is None:  # then it matters no more what the schedule is
            return f"the device is {engine.device.type}, and only GPUs have them"
        if not any(isinstance(instruction, CAPTURED) for instruction in instructions):
            is_exact = all(any(isinstance(instruction, kind) for instruction in instructions) for kind in _EXACT)
            return "schedule 1f1b exchanges activations between all of its passes" if is_exact else None
        if self._failure is not None:
            return self._failure
        if "_INSTRUCTION_MAP" in vars(engine):
            return "each instruction is timed on its own"
        return why_not(engine)

    def _graph_of(self, instructions: Sequence[Any], batches: Sequence[Batch], capture: Capture) -> TickGraph | None:
        """The graphs of a tick, captured now where it is time; None for a tick that runs eagerly."""
        form, needed = _form_of(instructions, batches), set(cuts_of(instructions))
        # A tick that fills or drains exchanges less than others: its graphs may be cut more often than it needs.
        self._cuts[form] |= needed
        graph = self.graphs.get(form)
        if graph is not None and needed <= set(graph.recordings):
            return graph
        self._warm[form] += 1
        if self._warm[form] <= WARMUP_TICKS:
            return None
        if graph is None and len(self.graphs) >= MOST_FORMS:
            self._tell_once(f"the batches have more than {MOST_FORMS} shapes", by_all=False)
            return None
        if self._engine.receiver is not None and not self._engine.receiver.is_readable:
            return None
        self.graphs.pop(form, None)
        if not self.graphs:
            capture.begin_pool()
        try:
            self.graphs[form] = record_tick(self._engine, capture, instructions, batches, cuts=self._cuts[form])
        except Exception as error:  # whatever the layers, DeepSpeed or CUDA have against it: training goes on
            self.drop()
            self._failure = f"their capture failed ({headline(error)})"
            self._tell_once(self._failure, by_all=False)
            return None
        return self.graphs[form]

    def _tell_once(self, reason: str, *, by_all: bool = True) -> None:
        """Tell a reason; one that all ranks have is told by the first alone."""
        if reason in self._told:
            return
        self._told.add(reason)
        rank = self._engine.global_rank
        if rank == 0 or not by_all:
            where = "" if by_all else f" on rank {rank}"
            self.tell(f"dsaux.run.cuda_graphs is true, but {reason}: ticks run eagerly{where}.")


def graphs_of(engine: LocalStepEngine) -> StageGraphs | None:
    """What runs the ticks of an engine as graphs; None where `dsaux.run.cuda_graphs` is off."""
    if not engine.settings.run.cuda_graphs:
        return None
    return StageGraphs(engine, CudaCapture(engine.device) if engine.device.type == "cuda" else None)


def why_not(engine: LocalStepEngine) -> str | None:
    """What of an engine's settings keeps its ticks from being captured, the same on all ranks; None if nothing does."""
    optimizer = engine.optimizer
    if engine.module.activation_checkpoint_interval > 0:
        return "activation checkpointing runs Python within the backward pass"
    if engine.fp16_enabled():
        return "fp16 scales the loss by a number that the host keeps"
    if isinstance(optimizer, ZeROOptimizer) and not isinstance(optimizer, BF16_Optimizer):
        return "ZeRO deals out the gradients in Python within the backward pass"
    if isinstance(optimizer, BF16_Optimizer) and optimizer.immediate_grad_update:
        return "bf16.immediate_grad_update moves the gradients in Python within the backward pass"
    if engine.flops_profiler_enabled():  # which switches the timers on, too
        return "the FLOPs profiler looks into the forward pass"
    if engine.wall_clock_breakdown():
        return "wall_clock_breakdown times every pass"
    return None


def _form_of(instructions: Sequence[Any], batches: Sequence[Batch]) -> _Form:
    """What a graph is captured for: the instructions, and shape, layout and precision of the batches."""
    captured = tuple((type(one), one.buffer_id) for one in instructions if isinstance(one, CAPTURED))
    tensors = tuple((tensor.shape, tensor.stride(), tensor.dtype) for batch in batches for tensor in batch)
    return captured, tensors
