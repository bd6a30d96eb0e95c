"""What all ranks must agree on in a step: to stop behind it, or to leave it out. Base of the engine.

A signal reaches the ranks at different moments, and a loss or a gradient that is no number is seen by one stage alone.
Both travel as flags: under a local schedule in the AuxNet's sum, which is sent anyway, under 1f1b in a message of their
own that nobody waits for before the next step. Every rank therefore knows of them in the same step.

    [ stop wanted | fault of stage 0 | .. | fault of stage K-1 ]        sums over all ranks

A rank looks for faults without waiting for its device, under a local schedule within the graph of a tick.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from dsaux.config import DsauxConfig
from dsaux.watch_rules import DivergedError

MOST_SKIPS_IN_A_ROW = 10
"""A run that skips more batches than this, one behind the other, has lost its weights: it stops."""
_GPU_DELAY = 2
LOSS, GRADIENT, AUX_GRADIENT = 1.0, 2.0**-12, 2.0**-24
"""What a fault counts: of the worst kind alone, so that the sum over up to 4095 replicas says which that was."""


class LateReader:
    """Reads a number off a device without waiting for it: it is known some steps later, on all ranks alike.

    Args:
        device: where the numbers come from.
        delay: steps between :meth:`put` and the :meth:`get` that returns it; 0 on a CPU, where nothing is late.
    """

    def __init__(self, device: torch.device, *, delay: int | None = None) -> None:
        self._on_host = device.type == "cpu"
        self._delay = delay if delay is not None else 0 if self._on_host else _GPU_DELAY
        self._under_way: deque[tuple[Tensor, Any]] = deque()

    def put(self, value: Tensor) -> None:
        """Start to read a scalar."""
        if self._on_host:
            self._under_way.append((value.detach().clone(), None))
            return
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._under_way.append((host, event))

    def get(self) -> float:
        """The scalar that was put `delay` calls before; 0 where there is none yet."""
        if len(self._under_way) <= self._delay:
            return 0.0
        value, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        return float(value)


class StepGuardEngine(PipelineEngine):  # type: ignore[misc]
    """Stops and skips in which all ranks take part.

    Attributes:
        stop_is_agreed: some rank has called :meth:`request_stop`, and all ranks know it; set behind the same step.
        stage_faults: for each stage how often its ranks saw a loss that is no number, in the last step; between 0 and 1
            where it was a gradient alone; shape (K,).
        is_skipped: whether the last step was left out.
    """

    schedule_name: str
    stop_is_agreed: bool
    stage_faults: Tensor
    is_skipped: bool

    def _init_step_guard(self, settings: DsauxConfig) -> None:
        self._skips = settings.run.nan == "skip"
        self._stop_is_wanted = self.stop_is_agreed = self.is_skipped = False
        self._skips_in_a_row = 0
        self._stop_reader = LateReader(self.device)
        self._fault = torch.zeros((), device=self.device)
        self._flag_work: tuple[Any, Tensor] | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self.stage_faults = torch.zeros(self.num_stages, device=self.device)
        self._first_faults = torch.zeros(self.num_stages, device=self.device)

    def request_stop(self) -> None:
        """Ask all ranks to stop: `stop_is_agreed` turns true on each of them behind the same step.

        Safe to call from a signal handler.
        """
        self._stop_is_wanted = True

    @property
    def is_local_schedule(self) -> bool:
        """True while stages train on local losses, False under 1f1b."""
        return self.schedule_name != "1f1b"

    # ---- flags ------------------------------------------------------------------------------------------------------

    def _begin_step_guard(self) -> None:
        self._fault.zero_()
        self.is_skipped = False
        if self._skips:
            # A forward pass writes into BatchNorm's running statistics: a batch that is left out must leave no trace.
            self._buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]

    def _note_loss(self, loss: Tensor) -> None:
        self._fault += ~torch.isfinite(loss.detach())

    def _note_gradients(self) -> None:
        """Note whether all gradients of this rank are finite, behind the last backward pass of a step."""
        held = getattr(self.optimizer, "fp32_groups_gradients_flat", ())  # of bf16 weights: the sums of their gradients
        self._note_unless_finite(list(held or self._gradients()), GRADIENT)

    def _note_unless_finite(self, gradients: list[Tensor], kind: float) -> None:
        if gradients:
            largest = torch.nn.utils.get_total_norm(gradients, torch.inf)
            torch.maximum(self._fault, ~torch.isfinite(largest) * kind, out=self._fault)

    def _gradients(self) -> Iterator[Tensor]:
        """Gradients of this stage, wherever the optimizer keeps them."""
        yield from getattr(self.optimizer, "fp32_groups_gradients_flat", ())
        for parameter in self.module.parameters():
            held = (parameter.grad, getattr(parameter, "grad_accum", None))  # ZeRO's, in another precision
            yield from (gradient for gradient in held if gradient is not None)

    def _own_flags(self) -> Tensor:
        """This rank's part of the flags, shape (1 + K,)."""
        flags = torch.zeros(1 + self.num_stages, device=self.device)
        if self._stop_is_wanted:
            flags[0] = 1
        flags[1 + self.stage_id] = self._fault
        return flags

    def _take_flags(self, flags: Tensor) -> None:
        """Take the sum of all ranks' flags."""
        self.stage_faults = flags[1:]
        self._first_faults += self.stage_faults * (self._first_faults.amax() == 0)
        self._stop_reader.put(flags[0])
        self.stop_is_agreed = self.stop_is_agreed or self._stop_reader.get() > 0

    def _exchange_flags(self) -> None:
        """Under 1f1b: take the flags of the step before, and send those of this one."""
        if self._flag_work is not None:
            work, flags = self._flag_work
            if work is not None:
                work.wait()
            self._flag_work = None
            self._take_flags(flags)
        flags = self._own_flags()
        work = dist.all_reduce(flags, group=self.module.world_group, async_op=True) if self._has_peers() else None
        self._flag_work = work, flags

    def _settle_flags(self) -> None:
        """Wait for the flags under way; the next :meth:`_exchange_flags` finds them there."""
        if self._flag_work is not None and self._flag_work[0] is not None:
            work, flags = self._flag_work
            work.wait()
            self._flag_work = None, flags

    def _flags_under_way(self) -> Tensor:
        """Wait for the flags of the last step, where the next one would take them, and leave them there."""
        self._settle_flags()
        return torch.zeros(1 + self.num_stages, device=self.device) if self._flag_work is None else self._flag_work[1]

    def find_fault(self, *, wait: bool) -> str | None:
        """What was the first to be no finite number, and at which stage; None while all are.

        The same on all ranks. It waits for the device.

        Args:
            wait: look at the last step also where its flags are still under way: under 1f1b, and with
                `dsaux.aux.overlap`. Then all ranks must ask.
        """
        faults = self._first_faults
        if wait:
            faults = torch.where(faults.amax() > 0, faults, self._flags_under_way()[1:])
        found: list[float] = faults.tolist()
        for kind, what in ((LOSS, "the loss"), (GRADIENT, "a gradient"), (AUX_GRADIENT, "a gradient of the AuxNet")):
            stages = [stage for stage, fault in enumerate(found) if fault >= kind]
            if stages:  # under 1f1b a gradient hands it on to the stages before
                return f"{what} at stage {stages[0] if kind == LOSS else stages[-1]}"
        return None

    def forget_faults(self) -> None:
        """Begin anew: :meth:`find_fault` finds nothing of the steps before."""
        self._settle_flags()
        if self._flag_work is not None:
            self._flag_work[1][1:].zero_()
        self._first_faults.zero_()

    def _has_peers(self) -> bool:
        return int(dist.get_world_size()) > 1

    # ---- skipping ---------------------------------------------------------------------------------------------------

    def _must_skip(self) -> bool:
        """Whether the present step is to be left out on this rank; under 1f1b a collective of all ranks."""
        faults = self._fault.clone()
        if self._has_peers():
            dist.all_reduce(faults, group=self.module.world_group)
        return float(faults) > 0

    def _exec_reduce_grads(self) -> None:
        """DeepSpeed's; a step that is left out has no gradients to reduce."""
        if not self.is_local_schedule:
            self._note_gradients()
        self.is_skipped = self._skips and self._must_skip()
        if self.is_skipped:
            for gradient in self._gradients():
                gradient.zero_()
            for buffer, value in self._buffers:
                buffer.copy_(value)
        super()._exec_reduce_grads()

    def _exec_optimizer_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """DeepSpeed's; a step that is left out counts, and the learning rate goes on, but no weight changes.

        Raises:
            DivergedError: if too many steps in a row were left out.
        """
        if not self.is_skipped:
            self._skips_in_a_row = 0
            super()._exec_optimizer_step(lr_kwargs)
            return
        with _without_step(self.optimizer):
            super()._exec_optimizer_step(lr_kwargs)
        self.skipped_steps += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row > MOST_SKIPS_IN_A_ROW:
            raise DivergedError(
                f"{self._skips_in_a_row} batches in a row gave a loss or a gradient that is not a finite number. Lower "
                "optimizer.params.lr or set gradient_clipping, and go on from a checkpoint with --resume."
            )


@contextlib.contextmanager
def _without_step(optimizer: Any) -> Iterator[None]:
    """Within the block the optimizer's `step` does nothing."""
    own = vars(optimizer).get("step")  # PyTorch's schedules put one into the instance
    optimizer.step = _nothing
    try:
        yield
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
