"""The one message between neighbouring stages: refreshed variables, one boundary up, a tick ahead. Used by the engine.

Each boundary of each replica has a process group of its own. Stage k writes the refreshed variables of a batch into a
`VariableSender` and starts to send; stage k-1 has posted its `VariableReceiver` before and reads them in its next tick:

    message    [ v of each micro-batch, float64 | lambda' of each micro-batch ]

The receiver can't know the size of the first message before its own first forward pass: the size goes ahead of it,
once, and the message itself is then received a tick late. The same code runs on gloo and on NCCL.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

TRANSPORTS = {"full": None, "bf16": torch.bfloat16}
"""Values of `dsaux.aux.transport`: precision of lambda' on its way; None is float32, or the network's float64."""

_SCALE_BYTES = 8
_KEPT_EVENTS = 1000


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
        numel: entries of one micro-batch's variable.
        dtype: precision of the variables.
        device: where the message lives.
    """

    def __init__(self, micro_batches: int, numel: int, *, dtype: torch.dtype, device: torch.device) -> None:
        head = micro_batches * _SCALE_BYTES
        self.bytes = torch.zeros(head + micro_batches * numel * dtype.itemsize, dtype=torch.uint8, device=device)
        self.scales = self.bytes[:head].view(torch.float64)
        self.variables = self.bytes[head:].view(dtype).view(micro_batches, numel)


class VariableSender:
    """Upper end of a boundary: sends the refreshed variables of a batch to the stage before.

    Args:
        peer: global rank of the stage before.
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

    def write(self, micro_batch: int, variable: Tensor, *, scale: Tensor | float) -> None:
        """Put the refreshed variable of one micro-batch into the message.

        Args:
            micro_batch: which one of the batch.
            variable: ``lambda'_k``, shape (B, ...); the same number of entries in every batch.
            scale: ``v_k`` that it was made with.

        Raises:
            RuntimeError: if the batch has another shape than the first one.
        """
        if self._message is None:
            dtype = TRANSPORTS[self.transport] or variable.dtype
            self._message = _Message(self.micro_batches, variable.numel(), dtype=dtype, device=variable.device)
            size = torch.tensor([variable.numel(), dtype.itemsize], device=variable.device)
            self._works.append(dist.isend(size, self.peer, group=self.group))
        target = self._message.variables[micro_batch]
        if target.numel() != variable.numel():
            raise RuntimeError(
                f"a micro-batch has an auxiliary variable of shape {tuple(variable.shape)}, but the first one had "
                f"{target.numel()} entries. Training batches must have one shape: drop the last, incomplete one."
            )
        target.copy_(variable.reshape(-1))
        self._message.scales[micro_batch] = scale

    def start(self) -> None:
        """Start to send; pairs with :meth:`VariableReceiver.post` on the stage before."""
        assert self._message is not None, "a schedule writes before it sends"
        self._works.append(dist.isend(self._message.bytes, self.peer, group=self.group))
        self.sent_bytes += self._message.bytes.numel()

    def wait(self) -> None:
        """Wait until the message has left and may be written again."""
        for work in self._works:
            self.meter.wait(work)
        self._works.clear()


class VariableReceiver:
    """Lower end of a boundary: receives the refreshed variables that the stage behind makes.

    Args:
        peer: global rank of the stage behind.
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
        self._size = torch.zeros(2, dtype=torch.int64, device=device)
        self._work: Any = None

    def post(self) -> None:
        """Post the receive of the next message; pairs with :meth:`VariableSender.start` on the stage behind."""
        tensor = self._size if self._message is None else self._message.bytes
        self._work = dist.irecv(tensor, self.peer, group=self.group)

    def wait(self) -> None:
        """Wait for the message that was posted last."""
        if self._came_early is not None:
            self._readable, self._came_early = self._came_early, None
            return
        self.meter.wait(self._work)
        if self._message is None:
            numel, itemsize = self._size.tolist()
            dtype = TRANSPORTS[self.transport] or {4: torch.float32, 8: torch.float64}[itemsize]
            self._message = _Message(self.micro_batches, numel, dtype=dtype, device=self.device)
            self.post()
            self.meter.wait(self._work)
        self._work, self._readable = None, self._message

    def read(self, micro_batch: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """The refreshed variable of one micro-batch and the scale that it was made with.

        Args:
            micro_batch: which one of the batch.
            like: ``X_(k+1)``, for the shape.

        Returns:
            ``lambda'_(k+1)``, shape of `like`, in float32 or float64, and ``v_(k+1)``, a float64 scalar. Both may be
            views of the message: as soon as the loss is computed the schedule posts the next receive, which writes
            over them.
        """
        assert self._readable is not None, "a schedule waits before it reads"
        variable = self._readable.variables[micro_batch]
        if variable.dtype == torch.bfloat16:
            variable = variable.float()
        return variable.view(like.shape), self._readable.scales[micro_batch]

    def state_dict(self) -> dict[str, Any] | None:
        """The message that the next tick reads, which is waited for; None where none is under way."""
        if self._work is not None:
            self.wait()
            self._came_early = self._readable
        message = self._came_early
        if message is None:
            return None
        numel, dtype = message.variables.shape[1], message.variables.dtype
        return {"numel": numel, "dtype": dtype, "bytes": message.bytes.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave: the next :meth:`wait` finds it there."""
        message = _Message(self.micro_batches, state["numel"], dtype=state["dtype"], device=self.device)
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
