"""Ranks of one host that share the batches of their replica: threads stand for the processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dsaux.data import node_share
from dsaux.data.node_share import BatchForm, NodeGroup, SharedLoader
from dsaux.data.stream import Batch
from dsaux.models.shapes import SampleSpec
from tests.unit.test_stream import equal, numbered_dataset, stream_of, take

TIMEOUT_S = 20.0
FORM = BatchForm(SampleSpec((3, 5, 5)), (), 4)


class Exchange:
    """All-gather of texts among threads."""

    def __init__(self, size: int) -> None:
        self.values = [""] * size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)

    def of(self, rank: int) -> Callable[[str], Sequence[str]]:
        def exchange(value: str) -> Sequence[str]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return exchange


class Counting:
    """Batch p holds the number p."""

    def __init__(self, *, fails_at: int = 10**9) -> None:
        self.position, self.fails_at, self.made = 0, fails_at, 0

    def seek(self, position: int) -> None:
        self.position = position

    def load(self) -> Batch:
        if self.position == self.fails_at:
            raise ValueError("picture.jpg is no image")
        batch = torch.full((4, 3, 5, 5), float(self.position)), torch.full((4,), self.position)
        self.position += 1
        self.made += 1
        return batch

    def close(self) -> None:
        pass


def in_threads(work: Callable[[int, SharedLoader], Any], *, size: int, loader: Counting, slots: int = 4) -> list[Any]:
    exchange = Exchange(size)

    def run(rank: int) -> Any:
        group = NodeGroup(tuple(range(size)), rank, slots, TIMEOUT_S, exchange.of(rank))
        shared = SharedLoader(group, form=FORM, make_loader=lambda: loader, device=torch.device("cpu"))
        try:
            return work(rank, shared)
        finally:
            exchange.barrier.wait()  # a rank that closes first must not be the reason why another fails
            shared.close()

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        return [future.exception() or future.result() for future in futures]


def numbers(batches: Sequence[Batch]) -> list[int]:
    for inputs, labels in batches:
        assert inputs.unique().tolist() == labels.unique().tolist()
    return [int(labels[0]) for _, labels in batches]


def test_all_ranks_get_all_batches_and_each_is_made_once() -> None:
    loader = Counting()
    found = in_threads(lambda rank, shared: numbers([shared.load() for _ in range(50)]), size=3, loader=loader)
    assert found == [list(range(50))] * 3
    assert 50 <= loader.made <= 50 + 4 + 1  # what fits the slots, and the one in hand


def test_a_rank_may_be_as_far_behind_as_there_are_slots_and_a_batch_belongs_to_its_reader() -> None:
    turn = threading.Semaphore(0)

    def work(rank: int, shared: SharedLoader) -> list[int]:
        shared.begin()
        if rank == 1:  # the last stage reads first, as under al
            ahead = [shared.load() for _ in range(4)]
            turn.release()
            return numbers([*ahead, *(shared.load() for _ in range(8))])
        turn.acquire()
        return numbers([shared.load() for _ in range(12)])

    assert in_threads(work, size=2, loader=Counting()) == [list(range(12))] * 2


def test_ranks_start_where_they_say_even_if_not_at_the_same_batch() -> None:
    def work(rank: int, shared: SharedLoader) -> list[int]:
        shared.seek(7 + 2 * rank)
        return numbers([shared.load() for _ in range(5)])

    assert in_threads(work, size=2, loader=Counting()) == [[7, 8, 9, 10, 11], [9, 10, 11, 12, 13]]


def test_nobody_waits_for_a_rank_that_has_left() -> None:
    def work(rank: int, shared: SharedLoader) -> list[int]:
        if rank == 0:
            shared.leave()
            return []
        first = numbers([shared.load() for _ in range(3)])
        if rank == 1:
            shared.leave()
            return first
        return [*first, *numbers([shared.load() for _ in range(37)])]

    assert in_threads(work, size=3, loader=Counting()) == [[], [0, 1, 2], list(range(40))]


@pytest.mark.parametrize("count", [0, 8])
def test_no_batch_is_made_and_no_memory_is_held_when_all_ranks_have_left(count: int) -> None:
    before, loader = shared_mappings(), Counting()

    def work(rank: int, shared: SharedLoader) -> list[int]:
        found = numbers([shared.load() for _ in range(count)])
        assert not shared_mappings() <= before
        shared.leave()
        for thread in threading.enumerate():
            if thread.name == "batches for this host":
                thread.join(TIMEOUT_S)
                assert not thread.is_alive(), "a host that needs no batches makes them"
        assert shared_mappings() <= before
        return found

    assert in_threads(work, size=3, loader=loader) == [list(range(count))] * 3
    assert loader.made <= (count + 4 + 1 if count else 0)  # what fits the slots, and the one in hand


def shared_mappings() -> set[str]:
    """Shared memory of loaders that this process sees."""
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/dsaux-" in line}


def test_a_stream_cannot_go_back() -> None:
    def work(rank: int, shared: SharedLoader) -> None:
        shared.load()
        shared.load()
        shared.seek(1)

    (error,) = in_threads(work, size=1, loader=Counting())
    assert isinstance(error, RuntimeError)
    assert "cannot go back from batch 2 to 1" in str(error)


def test_what_fails_in_the_maker_is_raised_by_all() -> None:
    first, second = in_threads(
        lambda rank, shared: [shared.load() for _ in range(9)], size=2, loader=Counting(fails_at=5)
    )
    assert isinstance(second, ValueError)
    assert str(second) == "picture.jpg is no image"
    assert isinstance(first, RuntimeError)
    assert "rank 1, which makes the batches of this host" in str(first)


def test_no_name_is_left_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    open_memory = node_share._open_memory

    def record(folder: Path, size: int) -> Any:
        made.append(Path("/dev/shm") / folder.name)
        assert made[-1].exists()
        return open_memory(folder, size)

    monkeypatch.setattr(node_share, "_open_memory", record)
    in_threads(lambda rank, shared: shared.load()[1].tolist(), size=2, loader=Counting())
    assert made
    assert not any(path.exists() for path in made)


def test_too_little_shared_memory_is_said_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_share.os, "posix_fallocate", full)
    exchange = Exchange(1)
    group = NodeGroup((0,), 0, 4, TIMEOUT_S, exchange.of(0))
    with pytest.raises(RuntimeError, match=r"/dev/shm cannot be had: No space left on device\. Make room there"):
        SharedLoader(group, form=FORM, make_loader=Counting, device=torch.device("cpu"))


def test_a_shared_stream_gives_the_batches_of_an_own_one() -> None:
    dataset, exchange = numbered_dataset(), Exchange(2)
    own = take(stream_of(dataset, loader="torch"), 15)

    def run(rank: int) -> list[Batch]:
        share = NodeGroup((0, 1), rank, 4, TIMEOUT_S, exchange.of(rank))
        stream = stream_of(dataset, loader="torch", share=share)
        stream.begin()
        return take(stream, 15)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(run, range(2)):
            assert equal(found, own)


def test_whole_numbers_and_labels_of_tokens_keep_their_types() -> None:
    form = BatchForm(SampleSpec((7,), vocabulary=30), (7,), 3)
    inputs, labels = form.views(torch.zeros(form.num_bytes, dtype=torch.uint8).numpy())
    assert (inputs.dtype, inputs.shape) == (torch.int64, (3, 7))
    assert (labels.dtype, labels.shape) == (torch.int64, (3, 7))
