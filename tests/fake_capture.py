"""A capture for the CPU with the semantics of CUDA graphs, for tests of `dsaux.stage_graph`.

Recording runs the Python once and leaves every tensor that was there before as it was. Replaying runs the recorded
kernels, those of the backward passes included, on the very same tensors, and no Python. Work that asks for a number on
the host can't be recorded, nor can a part of what a side stream does: a CPU has no streams, so what starts and awaits
work on one is counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsaux.aux_aside import SegmentAside

_HOST_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


@dataclass
class _Call:
    """One kernel: its arguments, and the outputs that are tensors of their own, no views of an argument."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor | None]
    is_view: bool


class FakeRecording:
    """Kernels in their order."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    @property
    def num_kernels(self) -> int:
        """Calls that run something; CUDA warns of a graph that has none."""
        return sum(not call.is_view for call in self.calls)

    def replay(self) -> None:
        """Run them again; each writes where it wrote before."""
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                if call.is_view:
                    continue
                results = _tensors(call.kernel(*call.args, **call.kwargs))
                for output, result in zip(call.outputs, results, strict=True):
                    if output is not None:
                        output.copy_(result)


class FakeCapture:
    """Makes fake recordings.

    Attributes:
        recordings: what was recorded, whether or not somebody still holds it.
    """

    def __init__(self) -> None:
        self.recordings: list[list[_Call]] = []
        self.begin_pool()

    def begin_pool(self) -> None:
        """Let the recordings that follow share memory with none before."""
        self._pool: weakref.WeakSet[FakeRecording] = weakref.WeakSet()
        self._is_used = False

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """Nothing to do on a CPU."""
        yield

    def record(self, work: Callable[[], None]) -> FakeRecording:
        """Record `work`.

        Raises:
            RuntimeError: where CUDA would, and if all recordings of the pool have gone: CUDA takes such a one again
                only once the last of its tensors has gone as well.
        """
        if self._is_used and not self._pool:
            raise RuntimeError("INTERNAL ASSERT FAILED: it->second->use_count > 0")
        recorder = _Recorder()
        random = torch.get_rng_state()
        try:
            with recorder, _side_streams():
                work()
        finally:
            recorder.put_back()
            torch.set_rng_state(random)
        self.recordings.append(recorder.recording.calls)
        self._pool.add(recorder.recording)
        self._is_used = True
        return recorder.recording


@contextlib.contextmanager
def _side_streams() -> Iterator[None]:
    """What CUDA asks of the side streams of a recording: each is forked in it, and joined before its end."""
    forked: set[int] = set()

    def forking(method: Any) -> Any:
        def run(aside: SegmentAside, *args: Any) -> Any:
            forked.add(id(aside))
            return method(aside, *args)

        return run

    def join(aside: SegmentAside) -> None:
        if id(aside) not in forked:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        forked.remove(id(aside))

    starts = {name: forking(getattr(SegmentAside, name)) for name in ("forward", "backward")}
    with patch.multiple(SegmentAside, join=join, **starts):
        yield
    if forked:
        raise RuntimeError("the capture sequence contains a fork that was not joined to the primary stream")


class _Recorder(TorchDispatchMode):
    """Stands below autograd: sees every kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = FakeRecording()
        self._made: set[int] = set()
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kernel._schema.name in _HOST_READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kernel._schema.name}")
        given = _tensors((args, kwargs))
        for tensor in given:
            self._save(tensor)
        result = kernel(*args, **kwargs)
        storages = {_storage(tensor) for tensor in given}
        outputs = [None if _storage(tensor) in storages else tensor for tensor in _tensors(result)]
        self._made.update(_storage(tensor) for tensor in outputs if tensor is not None)
        aliases = [argument.alias_info for argument in kernel._schema.arguments]
        writes = any(alias is not None and alias.is_write for alias in aliases)
        is_view = bool(outputs) and not writes and all(tensor is None for tensor in outputs)
        self.recording.calls.append(_Call(kernel, args, kwargs, outputs, is_view))
        return result

    def put_back(self) -> None:
        """Undo what was written to tensors that were there before."""
        for storage, copy in self._saved.values():
            storage.copy_(copy)

    def _save(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        # Every one that is read too: batch norm writes statistics that its schema calls inputs.
        if key not in self._made and key not in self._saved:
            storage = tensor.untyped_storage()
            self._saved[key] = (storage, storage.clone())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
