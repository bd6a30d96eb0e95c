"""One rank of a host makes the batches of a replica, the others on that host read them out of shared memory.

`dsaux.data.decode: once_per_node`. Every stage of a replica needs the same batch; where decoding is what limits the
input, one of them does it for all:

    maker     load p -> slot p mod N ----"p is there"----> readers
    readers   copy slot p mod N      ----"I need p+1"----> maker      a slot that nobody needs any more is filled anew

The slots lie in one piece of shared memory that has no name any more when the run starts; the short messages go through
Unix sockets, so that the end of either side is seen at once and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsaux.data.stream import Batch, Loader
from dsaux.models.shapes import SampleSpec

_NUMBER = struct.Struct("<q")
_NEVER = 2**62
"""Position that a reader needs when it will read no more."""
_FAILED = -1
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class BatchForm:
    """What every batch looks like.

    Attributes:
        input_spec: one sample.
        label_shape: of one sample; () for a class.
        batch_size: samples in a batch.
    """

    input_spec: SampleSpec
    label_shape: tuple[int, ...]
    batch_size: int

    @property
    def inputs_dtype(self) -> np.dtype[np.generic]:
        """float32, or int64 for whole numbers."""
        return np.dtype(np.int64 if self.input_spec.vocabulary else np.float32)

    @property
    def num_bytes(self) -> int:
        """Of a batch, labels behind the inputs, both on a multiple of eight bytes."""
        return self._inputs_bytes + 8 * self.batch_size * int(np.prod(self.label_shape, dtype=np.int64))

    @property
    def _inputs_bytes(self) -> int:
        numbers = self.batch_size * int(np.prod(self.input_spec.shape, dtype=np.int64))
        return -(-numbers * self.inputs_dtype.itemsize // 8) * 8

    def views(self, memory: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Inputs and labels as tensors that lie in `memory`, uint8 of shape (num_bytes,)."""
        shape = (self.batch_size, *self.input_spec.shape)
        count = int(np.prod(shape, dtype=np.int64)) * self.inputs_dtype.itemsize
        inputs = memory[:count].view(self.inputs_dtype).reshape(shape)
        labels = memory[self._inputs_bytes :].view(np.int64).reshape(self.batch_size, *self.label_shape)
        return torch.from_numpy(inputs), torch.from_numpy(labels)


@dataclass(frozen=True)
class NodeGroup:
    """The ranks of one replica on one host.

    Attributes:
        ranks: global ranks; the last one makes the batches.
        rank: this one.
        num_slots: batches that the shared memory holds: the furthest that two readers may be apart, and some to spare.
        timeout_s: seconds that a reader waits for a batch.
        exchange: `exchange(value) -> values of all ranks`; a collective call of ALL processes of the run.
    """

    ranks: tuple[int, ...]
    rank: int
    num_slots: int
    timeout_s: float
    exchange: Callable[[str], Sequence[str]]

    @property
    def is_maker(self) -> bool:
        """Whether this rank makes the batches."""
        return self.rank == self.ranks[-1]


class SharedLoader:
    """Loader of a rank that shares its host with others of its replica.

    All processes of the run make theirs at the same time.

    Args:
        group: who shares.
        form: of the batches.
        make_loader: makes the loader of whole batches, on the CPU; called by the maker alone.
        device: where the batches are put.

    Raises:
        RuntimeError: if the shared memory cannot be had.
    """

    def __init__(
        self, group: NodeGroup, *, form: BatchForm, make_loader: Callable[[], Loader], device: torch.device
    ) -> None:
        self._group, self._form, self._device = group, form, device
        self._position = 0
        self._known = -1  # newest position that is said to be there
        self._started = False
        self._maker: _Maker | None = None
        self._memory: NDArray[np.uint8] | None
        size = form.num_bytes * group.num_slots
        with contextlib.ExitStack() as names:
            folder = Path(names.enter_context(tempfile.TemporaryDirectory(prefix="dsaux-"))) if group.is_maker else None
            problem = ""
            if folder is not None:
                try:
                    self._maker = _Maker(folder, group, form=form, make_loader=make_loader, size=size)
                except OSError as error:
                    problem = f"{size / 2**30:.2f} GiB in {_SHARED_MEMORY} cannot be had: {error.strerror}"
            places = group.exchange(f"{folder or ''}\n{problem}")
            found, problem = places[group.ranks[-1]].split("\n")
            if problem:
                raise RuntimeError(
                    f"dsaux.data.decode is once_per_node but {problem}. Make room there, take a smaller micro-batch, "
                    "or set decode to every_rank."
                )
            if self._maker is None:
                self._memory = _open_memory(Path(found), size)
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(group.timeout_s)
                self._socket.connect(str(Path(found) / "socket"))
            else:
                self._memory = self._maker.memory
                self._maker.accept()
            group.exchange("")  # all have opened it: the names can go

    def seek(self, position: int) -> None:
        """Go on at this position, which must not lie before one that was read.

        Raises:
            RuntimeError: if it does.
        """
        if position < self._position and self._started:
            raise RuntimeError(
                f"a shared stream cannot go back from batch {self._position} to {position}: set dsaux.data.decode to "
                "every_rank."
            )
        self._position = position
        if self._started:
            self._need(position)

    def load(self) -> Batch:
        """Returns the next batch.

        Raises:
            RuntimeError: if the rank that makes the batches failed, ended, or is silent for too long.
        """
        assert self._memory is not None, "a rank that has left reads no more"
        self.begin()
        while self._known < self._position:
            self._known = self._maker.wait(self._position) if self._maker else self._receive()
        start = self._position % self._group.num_slots * self._form.num_bytes
        inputs, labels = self._form.views(self._memory[start : start + self._form.num_bytes])
        batch = (self._own(inputs), self._own(labels))
        self._position += 1
        self._need(self._position)
        return batch

    def begin(self) -> None:
        """Say where this rank will read first; no batch is made before all ranks of the group have said so."""
        if not self._started:
            self._started = True
            self._need(self._position)

    def leave(self) -> None:
        """Read no more, for good; the others need not wait for this rank, and behind the last no batch is made."""
        self._started = True
        self._memory = None
        self._need(_NEVER)

    def close(self) -> None:
        """End the thread and the connections."""
        if self._maker:
            self._maker.close()
        else:
            self._socket.close()

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self._device.type == "cpu" else tensor.to(self._device)

    def _need(self, position: int) -> None:
        if self._maker:
            self._maker.need(len(self._group.ranks) - 1, position)
            return
        with contextlib.suppress(OSError):  # the maker has ended: the next load says so
            self._socket.sendall(_NUMBER.pack(position))

    def _receive(self) -> int:
        try:
            known = _receive(self._socket)
        except TimeoutError as error:
            raise RuntimeError(
                f"rank {self._group.ranks[-1]}, which makes the batches of this host, gave none for "
                f"{self._group.timeout_s:.0f} s (dsaux.run.timeout_s)."
            ) from error
        if known is None or known == _FAILED:
            raise RuntimeError(
                f"rank {self._group.ranks[-1]}, which makes the batches of this host (dsaux.data.decode), has ended or "
                "failed; see its message."
            )
        return known


class _Maker:
    """The rank that makes the batches, in a thread ahead of all readers."""

    def __init__(
        self, folder: Path, group: NodeGroup, *, form: BatchForm, make_loader: Callable[[], Loader], size: int
    ) -> None:
        self._group, self._form, self._make_loader = group, form, make_loader
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(len(group.ranks))
        self._listener.settimeout(group.timeout_s)
        memory = _SHARED_MEMORY / folder.name
        try:
            descriptor = os.open(memory, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)  # now, not when a slot is written
            finally:
                os.close(descriptor)
            self.memory: NDArray[np.uint8] | None = _open_memory(folder, size)
        except OSError:
            memory.unlink(missing_ok=True)
            raise
        self._name: Path | None = memory
        self._needs: list[int | None] = [None] * len(group.ranks)  # next position of each reader, the maker's own last
        self._sockets: list[socket.socket] = []
        self._made = -1
        self._error: BaseException | None = None
        self._is_closed = False
        self._change = threading.Condition()

    def accept(self) -> None:
        """Take the connections of all readers, then forget the names and start."""
        for reader in range(len(self._group.ranks) - 1):
            connection, _ = self._listener.accept()
            connection.settimeout(None)
            self._sockets.append(connection)
            threading.Thread(target=self._listen, args=(reader, connection), daemon=True).start()
        self._listener.close()
        if self._name:
            self._name.unlink(missing_ok=True)
        threading.Thread(target=self._make, name="batches for this host", daemon=True).start()

    def need(self, reader: int, position: int) -> None:
        """Note which position a reader needs next."""
        with self._change:
            self._needs[reader] = position
            self._change.notify_all()

    def wait(self, position: int) -> int:
        """Wait until a position is there; returns the newest.

        Raises:
            RuntimeError: if it is not there in time.
        """
        with self._change:
            self._change.wait_for(
                lambda: self._made >= position or self._error is not None, timeout=self._group.timeout_s
            )
            if self._made >= position:
                return self._made
            if self._error is not None:
                raise self._error
        raise RuntimeError(
            f"no batch for {self._group.timeout_s:.0f} s (dsaux.run.timeout_s): a reader on this host does not go on."
        )

    def close(self) -> None:
        """End the threads."""
        with self._change:
            self._is_closed = True
            self._change.notify_all()
        for connection in self._sockets:
            connection.close()

    def _make(self) -> None:
        try:
            self._make_all()
        except BaseException as error:  # of the loader: the main thread raises it in its next load
            with self._change:
                self._error = error
                self._change.notify_all()
            self._tell(_FAILED)
        finally:
            self.memory = None  # it is given back when the last rank has left

    def _make_all(self) -> None:
        memory = self.memory
        assert memory is not None, "it is there until this thread ends"
        with self._change:
            self._change.wait_for(lambda: self._is_closed or None not in self._needs)
            if self._is_over():
                return
            position = self._oldest()
        loader = self._make_loader()
        try:
            loader.seek(position)
            while not self._is_closed:
                inputs, labels = loader.load()
                if not self._wait_for_slot(position):
                    return
                start = position % self._group.num_slots * self._form.num_bytes
                places = self._form.views(memory[start : start + self._form.num_bytes])
                for place, tensor in zip(places, (inputs, labels), strict=True):
                    place.copy_(tensor)
                with self._change:
                    self._made = position
                    self._change.notify_all()
                self._tell(position)
                position += 1
        finally:
            loader.close()

    def _wait_for_slot(self, position: int) -> bool:
        with self._change:
            self._change.wait_for(lambda: self._is_closed or position - self._oldest() < self._group.num_slots)
            return not self._is_over()

    def _is_over(self) -> bool:
        """Whether nobody will read any more."""
        return self._is_closed or self._oldest() == _NEVER

    def _oldest(self) -> int:
        return min(need for need in self._needs if need is not None)

    def _tell(self, position: int) -> None:
        for need, connection in zip(self._needs, self._sockets, strict=False):  # the maker's own need has no socket
            if need == _NEVER:
                continue  # it does not listen any more either: the socket would fill up
            with contextlib.suppress(OSError):  # a reader that has ended; the run's watch knows
                connection.sendall(_NUMBER.pack(position))

    def _listen(self, reader: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (position := _receive(connection)) is not None:
                self.need(reader, position)
        self.need(reader, _NEVER)


def _open_memory(folder: Path, size: int) -> NDArray[np.uint8]:
    descriptor = os.open(_SHARED_MEMORY / folder.name, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
    finally:
        os.close(descriptor)


def _receive(connection: socket.socket) -> int | None:
    """The next number; None when the other side has ended."""
    data = b""
    while len(data) < _NUMBER.size:
        try:
            part = connection.recv(_NUMBER.size - len(data))
        except ConnectionError:
            return None
        if not part:
            return None
        data += part
    return int(_NUMBER.unpack(data)[0])
