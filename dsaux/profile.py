"""Where the time of a step goes: a clock on the instructions that a rank runs, and the table of a run's profile.

python -m dsaux.profile runs/quickstart                    # of a run with dsaux.run.profile_steps above 0
python -m dsaux.profile runs/quickstart --json

`InstructionClock` stands between DeepSpeed's `_exec_schedule` and the instructions of one engine; `dsaux.profile_run`
has one in a training run, `dsaux.profile_table` prints what it wrote. On a CPU the time of an instruction is the wall
clock's. On a GPU, where kernels run behind the host, it is the time between two events on the stream: nothing waits for
it. The terms are those of Eq. 27 of arXiv:2112.05387, by which K stages are faster than one device by

    (T_d + T_f + T_b) / (T_d + t_psi + t_f + t_b + (T_f + T_b) / K)

with T_d for the data, t_f and t_b for the AuxNet's forward and backward pass, t_psi for its update, T_f and T_b for the
network's passes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Protocol

TERMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "data": ("LoadReplicaBatch", "LoadMicroBatch"),
        "aux_forward": ("AuxForward",),
        "aux_backward": ("AuxBackward",),
        "aux_update": ("AuxOptimizerStep",),
        "stage": (
            "LocalForward",
            "ReceivedForward",
            "PenaltyLoss",
            "LagrangianLoss",
            "HeadLoss",
            "LocalBackward",
            "HeadBackward",
            "ForwardPass",
            "BackwardPass",
            "OptimizerStep",
        ),
        "transfer": (
            "RefreshVariable",
            "SendVariable",
            "RecvVariable",
            "WaitSendVariable",
            "WaitRecvVariable",
            "WriteOutput",
            "SendOutput",
            "RecvOutput",
            "WaitSendOutput",
            "WaitRecvOutput",
            "SendActivation",
            "RecvActivation",
            "SendGrad",
            "RecvGrad",
            "ReduceAuxGrads",
            "ReduceGrads",
            "ReduceTiedGrads",
        ),
    }
)
"""Terms of a step by the instructions that belong to them; an instruction of no term counts as "other". Waits for
others are in the term of the instruction that waits: in `transfer`, and for the AuxNet's sum in `aux_update`."""

OTHER = "other"
_KEPT_EVENTS = 1000


class _Times(Protocol):
    """Adds up the time of blocks by name."""

    def measure(self, name: str) -> contextlib.AbstractContextManager[None]: ...

    def totals(self) -> dict[str, float]: ...


class HostTimes:
    """Wall-clock seconds by name.

    Args:
        synchronize: called before each look at the clock.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._synchronize = synchronize or _nothing

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        self._synchronize()
        started = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def totals(self) -> dict[str, float]:
        """Seconds so far."""
        return dict(self._seconds)


class StreamTimes:
    """Seconds by name that a GPU's stream spent between the beginning and the end of a block, idle time included.

    The host never waits but in :meth:`totals`.

    Args:
        make_event: a timing event that is not recorded yet.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._seconds: dict[str, float] = {}
        self._pending: deque[tuple[str, Any, Any]] = deque()

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        before, after = self._make_event(), self._make_event()
        before.record()
        try:
            yield
        finally:
            after.record()
            self._pending.append((name, before, after))
            if len(self._pending) > _KEPT_EVENTS:  # nobody asks: old ones have long ended
                self._count()

    def totals(self) -> dict[str, float]:
        """Seconds so far; waits for the GPU."""
        while self._pending:
            self._count()
        return dict(self._seconds)

    def _count(self) -> None:
        name, before, after = self._pending.popleft()
        after.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + before.elapsed_time(after) / 1000.0


class InstructionClock:
    """Counts the time of every instruction of an engine; a context, which may be entered again and goes on then.

    Each instruction is a range of NVTX (on a GPU) and of PyTorch's profiler, under its own name.

    Args:
        engine: a DeepSpeed `PipelineEngine`, dsaux's or another.
        synchronize: on a GPU take the wall clock, and wait for this rank's own stream before and after each
            instruction, which costs overlap; no effect on a CPU.

    Attributes:
        calls: how often each instruction was run, by its name.
    """

    def __init__(self, engine: Any, *, synchronize: bool = False) -> None:
        import torch

        self.calls: dict[str, int] = {}
        self._engine = engine
        self._is_cuda = torch.device(engine.device).type == "cuda"
        self._record_function = torch.profiler.record_function
        self._times, self._whole = (_times_of(engine.device, synchronize=synchronize) for _ in range(2))

    def __enter__(self) -> InstructionClock:
        # An attribute of the instance hides that of the class: other engines of this process are not timed.
        plain = self._engine._INSTRUCTION_MAP
        self._engine._INSTRUCTION_MAP = {kind: self._timed(kind.__name__, run) for kind, run in plain.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._engine._INSTRUCTION_MAP

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time the instructions of the block, and the block as one step."""
        with self, self._whole.measure("step"):
            yield

    @property
    def seconds(self) -> dict[str, float]:
        """By the instruction's name, since the clock was made; waits for a GPU."""
        return self._times.totals()

    @property
    def step_seconds(self) -> float:
        """Time in :meth:`step`; waits for a GPU."""
        return self._whole.totals().get("step", 0.0)

    def terms(self) -> dict[str, float]:
        """Seconds of each term since the clock was made, all terms named."""
        of = {name: term for term, names in TERMS.items() for name in names}
        totals = dict.fromkeys((*TERMS, OTHER), 0.0)
        for name, seconds in self.seconds.items():
            totals[of.get(name, OTHER)] += seconds
        return totals

    def _timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(engine: Any, *args: Any, **kwargs: Any) -> Any:
            with self._range(name):
                return run(engine, *args, **kwargs)

        return timed

    @contextlib.contextmanager
    def _range(self, name: str) -> Iterator[None]:
        import torch

        if self._is_cuda:
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        try:
            with self._times.measure(name), self._record_function(name):
                yield
        finally:
            self.calls[name] = self.calls.get(name, 0) + 1
            if self._is_cuda:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def _times_of(device: Any, *, synchronize: bool) -> _Times:
    import torch

    if torch.device(device).type != "cuda":
        return HostTimes()
    if synchronize:
        # The stream and not the device: a receive that was posted ahead, on a stream of its own, must not be awaited.
        return HostTimes(lambda: torch.cuda.current_stream(device).synchronize())
    return StreamTimes(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]


def _nothing() -> None:
    return None


if __name__ == "__main__":
    from dsaux.command import run
    from dsaux.profile_table import main

    sys.exit(run(main))
