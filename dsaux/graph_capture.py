"""CUDA's side of captured ticks: how a piece of work becomes a graph that can be replayed. Used by `dsaux.stage_graph`.

A graph is the list of kernels that a piece of Python has started, with the addresses of their tensors. Capturing runs
the Python and no kernel; replaying runs the kernels and no Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class Recording(Protocol):
    """Work that was captured."""

    def replay(self) -> Any:
        """Do it again on the same tensors, behind what the present stream has been given."""


class Capture(Protocol):
    """Makes recordings; the tests have one for the CPU."""

    def warm_up(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block work runs eagerly where it will be captured: lazy initialisations belong here."""

    def record(self, work: Callable[[], None]) -> Recording:
        """Capture `work`: its Python runs once, its kernels not at all.

        Tensors that it makes lie at the same place in every replay as long as somebody holds them. Recordings of one
        `Capture` share memory: those of a tick must be replayed in the order in which they were made.
        """

    def begin_pool(self) -> None:
        """Let the recordings that follow have memory of their own: all that were made before have been dropped."""


def leave_default_stream(device: torch.device) -> None:
    """Go on, in this thread, on a stream on which work can be captured: the default one is none.

    Autograd adds up a parameter's gradient on the stream that was present when the parameter was first used. Whoever
    keeps hold of that place, as DeepSpeed's bf16 optimizer does, ties all later backward passes to the stream, so that
    a capture on another one would reach beyond its graph.

    Args:
        device: a GPU.
    """
    present = torch.cuda.current_stream(device)
    if present == torch.cuda.default_stream(device):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(present)
        torch.cuda.set_stream(stream)


class CudaCapture:
    """Captures CUDA graphs with one private memory pool, on the present stream or, if that is the default one, its own.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        present = torch.cuda.current_stream(device)
        is_default = present == torch.cuda.default_stream(device)
        self._stream = torch.cuda.Stream(device) if is_default else present  # type: ignore[no-untyped-call]
        self.begin_pool()

    def begin_pool(self) -> None:
        """See `Capture`. CUDA's memory takes no graph into a pool without graphs of which a tensor is still held."""
        self._pool: Any = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """See `Capture`. On the stream of the captures, as CUDA asks; the present stream waits for it."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            yield
        present.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Recording:
        """See `Capture`.

        Raises:
            Exception: what `work` raised, or CUDA; work that follows runs as if nothing had been tried.
        """
        graph = torch.cuda.CUDAGraph()
        present = torch.cuda.current_stream(self._device)
        try:
            # Of this thread alone: those of a loader and of NCCL may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
            return graph
        except BaseException as error:
            self._clean_up(present)
            cause = _first_cause(error)
        try:
            raise cause  # behind the block: within it Python would tie it to CUDA's error, whose frames hold it
        finally:
            del cause  # which holds this frame, the graph and all tensors of the capture

    def _clean_up(self, present: torch.cuda.Stream) -> None:
        """Undo what PyTorch leaves behind a capture whose end has failed, depending on its version.

        The stream of the capture is the present one, allocations still belong to the pool, and the random generator
        still waits for the end.
        """
        torch.cuda.set_stream(present)
        index = self._device.index if self._device.index is not None else torch.cuda.current_device()
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
        with contextlib.suppress(AttributeError, RuntimeError):
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())


def _first_cause(error: BaseException) -> BaseException:
    """What was raised first: CUDA's own, at a capture's end, says no more than that something was wrong before."""
    while error.__context__ is not None:
        error = error.__context__
    return error
