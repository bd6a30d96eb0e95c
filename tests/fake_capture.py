"""A capture for the CPU with the semantics of CUDA graphs, for tests of `dsaux.stage_graph`.

Recording runs the Python once and leaves every tensor that was there before as it was. Replaying runs the recorded
kernels, those of the backward passes included, on the very same tensors, and no Python. Work that asks for a number on
the host can't be recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        recordings: all that were made.
    """

    def __init__(self) -> None:
        self.recordings: list[FakeRecording] = []

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """Nothing to do on a CPU."""
        yield

    def record(self, work: Callable[[], None]) -> FakeRecording:
        """Record `work`."""
        recorder = _Recorder()
        random = torch.get_rng_state()
        try:
            with recorder:
                work()
        finally:
            recorder.put_back()
            torch.set_rng_state(random)
        self.recordings.append(recorder.recording)
        return recorder.recording


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
