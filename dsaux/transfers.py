"""The one message between neighbouring stages, over one boundary, a tick ahead. Used by the engine.

Under `al` refreshed variables go up, from stage k to stage k-1; under `local` what a stage has made goes down, from
stage k to stage k+1. Each boundary of each replica has a process group of its own. A stage writes the variables of a
batch into a `VariableSender` and starts to send; its neighbour has posted its `VariableReceiver` before and reads them
in its next tick:

    message    [ v of each micro-batch, float64; 1 under local | lambda' or X of each micro-batch ]

The receiver can't know the shape in the first message before its own first forward pass: the shape goes ahead of it,
once, and the message itself is then received a tick late. The same code runs on gloo and on NCCL.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

TRANSPORTS = {"full": None, "bf16": torch.bfloat16}
"""Values of `dsaux.aux.transport`: precision of the variables on their way; None is their own."""

_SCALE_BYTES = 8
_KEPT_EVENTS = 1000
_LARGEST_AXES = 8
_FULL = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class WaitMeter:
    """Time that a rank loses in waits for others.

    On a CPU the wall clock in `wait`; on a GPU, where `wait` returns at once, the time that the stream stands still.

    Args:
        device: the rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._waited_s = 0.0
        self._events: deque[tuple[Any, Any]] = deque()

    def wait(self, work: Any) -> None:
        """Wait for a transfer or a collective, and count the time."""
        if self._on_host:
            started = time.perf_counter()
            work.wait()
            self._waited_s += time.perf_counter() - started
            return
        before, after = (get_accelerator().Event(enable_timing=True) for _ in range(2))
        before.record()
        work.wait()
        after.record()
        self._events.append((before, after))
        if len(self._events) > _KEPT_EVENTS:  # nobody asks: old ones have long ended
            self._count(self._events.popleft())

    def take_s(self) -> float:
        """Seconds waited since the last call; synchronises with a GPU."""
        while self._events:
            self._count(self._events.popleft())
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _count(self, pair: tuple[Any, Any]) -> None:
        before, after = pair
        after.synchronize()
        self._waited_s += before.elapsed_time(after) / 1000.0


class _Message:
    """The bytes of one message and the tensors in it.

    Args:
        micro_batches: micro-batches in a batch.
        shape: of one micro-batch's variable.
        dtype: precision of the variables.
        device: where the message lives.
    """

    def __init__(self, micro_batches: int, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = tuple(shape)
        head, numel = micro_batches * _SCALE_BYTES, math.prod(self.shape)
        self.bytes = torch.zeros(head + micro_batches * numel * dtype.itemsize, dtype=torch.uint8, device=device)
        self.scales = self.bytes[:head].view(torch.float64)
        self.variables = self.bytes[head:].view(dtype).view(micro_batches, numel)


class VariableSender:
    """The end of a boundary that sends the variables of a batch to a neighbouring stage.

    Args:
        peer: global rank of that stage.
        group: process group of the two.
        micro_batches: micro-batches in a batch.
        transport: a name in `TRANSPORTS`.
        meter: counts the time that is lost in waits.
    """

    def __init__(self, *, peer: int, group: Any, micro_batches: int, transport: str, meter: WaitMeter) -> None:
        self.peer, self.group, self.micro_batches, self.transport = peer, group, micro_batches, transport
        self.meter = meter
        self.sent_bytes = 0
        self._message: _Message | None = None
        self._works: list[Any] = []

    def write(self, micro_batch: int, variable: Tensor, *, scale: Tensor | float = 1.0) -> None:
        """Put the variable of one micro-batch into the message.

        Args:
            micro_batch: which one of the batch.
            variable: ``lambda'_k`` or ``X_(k+1)``, shape (B, ...); the same number of entries in every batch.
            scale: ``v_k`` that ``lambda'_k`` was made with.

        Raises:
            RuntimeError: if the batch has another shape than the first one.
        """
        if self._message is None:
            dtype = TRANSPORTS[self.transport] or variable.dtype
            self._message = _Message(self.micro_batches, variable.shape, dtype=dtype, device=variable.device)
            form = [dtype.itemsize, variable.ndim, *variable.shape, *[0] * (_LARGEST_AXES - variable.ndim)]
            self._works.append(dist.isend(torch.tensor(form, device=variable.device), self.peer, group=self.group))
        target = self._message.variables[micro_batch]
        if target.numel() != variable.numel():
            raise RuntimeError(
                f"a micro-batch has an auxiliary variable of shape {tuple(variable.shape)}, but the first one had "
                f"{target.numel()} entries. Training batches must have one shape: drop the last, incomplete one."
            )
        target.view(variable.shape).copy_(variable)  # in the order of its indices, whatever its memory format
        self._message.scales[micro_batch] = scale

    def start(self) -> None:
        """Start to send; pairs with :meth:`VariableReceiver.post` on the other stage."""
        assert self._message is not None, "a schedule writes before it sends"
        self._works.append(dist.isend(self._message.bytes, self.peer, group=self.group))
        self.sent_bytes += self._message.bytes.numel()

    def wait(self) -> None:
        """Wait until the message has left and may be written again."""
        for work in self._works:
            self.meter.wait(work)
        self._works.clear()


class VariableReceiver:
    """The end of a boundary that receives the variables that a neighbouring stage makes.

    Args:
        peer: global rank of that stage.
        group: process group of the two.
        micro_batches: micro-batches in a batch.
        transport: a name in `TRANSPORTS`.
        device: where messages are received.
        meter: counts the time that is lost in waits.
    """

    def __init__(
        self, *, peer: int, group: Any, micro_batches: int, transport: str, device: torch.device, meter: WaitMeter
    ) -> None:
        self.peer, self.group, self.micro_batches, self.transport = peer, group, micro_batches, transport
        self.device, self.meter = device, meter
        self._message: _Message | None = None
        self._readable: _Message | None = None
        self._came_early: _Message | None = None
        self._form = torch.zeros(2 + _LARGEST_AXES, dtype=torch.int64, device=device)
        self._work: Any = None

    def post(self) -> None:
        """Post the receive of the next message; pairs with :meth:`VariableSender.start` on the other stage."""
        tensor = self._form if self._message is None else self._message.bytes
        self._work = dist.irecv(tensor, self.peer, group=self.group)

    def wait(self) -> None:
        """Wait for the message that was posted last."""
        if self._came_early is not None:
            self._readable, self._came_early = self._came_early, None
            return
        self.meter.wait(self._work)
        if self._message is None:
            itemsize, axes, *sides = self._form.tolist()
            dtype = TRANSPORTS[self.transport] or _FULL[itemsize]
            self._message = _Message(self.micro_batches, sides[:axes], dtype=dtype, device=self.device)
            self.post()
            self.meter.wait(self._work)
        self._work, self._readable = None, self._message

    @property
    def is_readable(self) -> bool:
        """Whether a message has come, so that :meth:`read` finds one."""
        return self._readable is not None

    def read(self, micro_batch: int) -> tuple[Tensor, Tensor]:
        """The variable of one micro-batch and the scale that it was made with.

        Args:
            micro_batch: which one of the batch.

        Returns:
            ``lambda'_(k+1)`` or ``X_k``, in the sender's shape, in float32 or float64, and ``v_(k+1)`` or 1, a float64
            scalar. Both may be views of the message, which the next receive that the schedule posts writes over.
        """
        assert self._readable is not None, "a schedule waits before it reads"
        variable = self._readable.variables[micro_batch]
        if variable.dtype == torch.bfloat16:
            variable = variable.float()
        return variable.view(self._readable.shape), self._readable.scales[micro_batch]

    def settle(self) -> None:
        """Wait for the message under way; the next :meth:`wait` finds it there."""
        if self._work is not None:
            self.wait()
            self._came_early = self._readable

    def state_dict(self) -> dict[str, Any] | None:
        """The message that the next tick reads, which is waited for; None where none is under way."""
        self.settle()
        message = self._came_early
        if message is None:
            return None
        return {"shape": message.shape, "dtype": message.variables.dtype, "bytes": message.bytes.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave: the next :meth:`wait` finds it there."""
        shape = state["shape"] if "shape" in state else (state["numel"],)  # older checkpoints did not have it
        message = _Message(self.micro_batches, shape, dtype=state["dtype"], device=self.device)
        message.bytes.copy_(state["bytes"])
        self._came_early = message


def boundary_groups(replicas: list[list[int]]) -> dict[tuple[int, int], Any]:
    """A process group for each boundary of each replica; a collective call of all ranks.

    Args:
        replicas: global ranks of each replica's stages, in order.

    Returns:
        Groups by (rank of the stage before, rank of the stage behind).
    """
    pairs = [pair for ranks in replicas for pair in itertools.pairwise(ranks)]
    return {pair: dist.new_group(list(pair)) for pair in pairs}
