"""Who is to blame for the end of a run, and what is said of it: on plain data, without processes that die."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsaux.config_rules import ConfigError
from dsaux.runtime import Place
from dsaux.watch import Watch
from dsaux.watch_board import locate, machine, main_thread_frames, process_exists
from dsaux.watch_rules import (
    DivergedError,
    RunFailedError,
    Seen,
    Sign,
    behind,
    describe,
    find_gone,
    find_stalled,
    headline,
    is_consequence,
)

NOW = 1000.0


def sign(rank: int, **changes: Any) -> Sign:
    """The sign of a rank that trains in step 120."""
    values = {"host": f"node{rank}", "stage": rank, "step": 120, "activity": "training step", "place": f"a.py:{rank}"}
    return Sign(rank=rank, **{**values, **changes})


def seen(rank: int, *, silent_s: float = 0.5, still_s: float = 0.5, **changes: Any) -> Seen:
    return Seen(sign(rank, **changes), heard_at=NOW - silent_s, moved_at=NOW - still_s)


def gone(*others: Seen, silence_s: float = 30.0, dead: tuple[int, ...] = (), here: tuple[int, ...] = ()) -> str | None:
    """Text of `find_gone` where the ranks `here` are on this machine and `dead` of them have no process."""
    cause = find_gone(
        others,
        now=NOW,
        silence_s=silence_s,
        is_alive=lambda s: s.rank not in dead if s.rank in (*here, *dead) else None,
    )
    return cause and cause.text


def stalled(*ranks: Seen, missing: tuple[int, ...] = ()) -> tuple[str, tuple[int, ...]] | None:
    cause = find_stalled(ranks, now=NOW, stall_s=60.0, missing=missing)
    return cause and (cause.text, cause.ranks)


@pytest.mark.parametrize(
    ("error", "words"),
    [(ValueError("first\nsecond"), "ValueError: first"), (ValueError(" \n"), "ValueError"), (KeyError(), "KeyError")],
)
def test_the_headline_of_an_error_is_its_kind_and_first_line(error: Exception, words: str) -> None:
    assert headline(error) == words


def test_a_process_that_has_ended_is_gone_at_once() -> None:
    assert gone(seen(1), seen(2), dead=(2,)) == (
        "rank 2 (host node2, stage 2, step 120, training step) is gone: its process was killed (out of memory? see "
        "dmesg) or crashed (see its own output)"
    )


def test_of_ranks_that_went_together_rank_0_was_the_first_unless_another_is_silent_for_longer() -> None:
    text = gone(seen(0, silent_s=1.0), seen(2, silent_s=2.5), dead=(0, 2))
    assert text is not None
    assert text.startswith("rank 0 (")
    text = gone(seen(0, silent_s=1.0), seen(2, silent_s=3.5), dead=(0, 2))
    assert text is not None
    assert text.startswith("rank 2 (")


def test_a_rank_of_another_host_is_gone_when_it_is_silent_for_too_long() -> None:
    assert gone(seen(1, silent_s=29.0)) is None
    text = gone(seen(1, silent_s=31.0))
    assert text is not None
    assert text.startswith(
        "rank 1 (host node1, stage 1, step 120, training step) gave no sign of life for 31 s: it was"
    )
    assert gone(seen(1, silent_s=5.0), silence_s=4.0) is not None


def test_silence_alone_does_not_make_a_living_process_gone() -> None:
    assert gone(seen(1, silent_s=500.0), here=(1,)) is None


def test_of_several_that_are_gone_the_first_is_named() -> None:
    text = gone(seen(1, silent_s=1.0), seen(2, silent_s=2.0), dead=(1, 2))
    assert text is not None
    assert text.startswith("rank 2 ")


def test_a_rank_that_has_ended_as_it_should_is_never_missed() -> None:
    assert gone(seen(1, silent_s=500.0, is_done=True), seen(2, is_done=True), dead=(2,)) is None
    assert stalled(seen(0, still_s=500.0, is_done=True), seen(1)) is None
    assert stalled(seen(0, still_s=500.0, is_done=True)) is None


def test_nobody_hangs_while_one_rank_moves() -> None:
    assert stalled(seen(0, still_s=500.0), seen(1, still_s=59.0)) is None


def test_the_rank_that_hangs_is_the_one_that_does_not_wait() -> None:
    found = stalled(
        seen(0, still_s=70.0, waits=True), seen(1, still_s=61.0, step=121), seen(2, still_s=62.0, waits=True)
    )
    assert found is not None
    text, ranks = found
    assert text.startswith("rank 1 (host node1, stage 1, step 121, training step) hangs at a.py:1: no rank has made")
    assert ranks == (1,)


def test_a_stopped_process_hangs_even_if_it_was_in_a_wait_when_it_stopped() -> None:
    found = stalled(seen(0, still_s=61.0), seen(1, still_s=61.0, silent_s=61.0, waits=True))
    assert found is not None
    assert found[1] == (1,)


def test_ranks_that_cannot_be_told_apart_are_all_named_with_their_places() -> None:
    found = stalled(seen(0, still_s=61.0), seen(1, still_s=61.0))
    assert found is not None
    text, ranks = found
    assert ranks == (0, 1)
    assert "is at a.py:0, rank 1 (host node1" in text


def test_a_rank_that_never_came_is_named_where_nothing_moves() -> None:
    assert stalled(seen(0, still_s=61.0), missing=(1, 2)) == (
        "rank 1, 2 did not come: no rank has made progress for 61 s",
        (),
    )
    assert stalled(seen(0), missing=(1,)) is None


def test_behind_is_the_lowest_step_of_those_that_do_not_wait() -> None:
    assert behind([sign(0, step=7), sign(1, step=6), sign(2, step=5, waits=True)]) == [sign(1, step=6)]
    assert behind([sign(0, step=7, waits=True), sign(1, step=6, waits=True)]) == [sign(1, step=6, waits=True)]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("the loss\n  is nan"), "RuntimeError: the loss is nan"),
        (DivergedError("the loss\n  is nan"), "the loss is nan"),
        (KeyError(), "KeyError"),
        (KeyboardInterrupt(), "interrupted"),
        (MemoryError(), "out of memory. Lower train_batch_size, or set pipeline.activation_checkpoint_interval to 1."),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."),
            "out of memory: CUDA out of memory. Tried 2 GiB. Lower train_batch_size, or set "
            "pipeline.activation_checkpoint_interval to 1.",
        ),
    ],
)
def test_an_error_is_described_in_one_line(error: BaseException, text: str) -> None:
    assert describe(error) == text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:9142: Connection reset by peer"), True),
        (RuntimeError("gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (torch.distributed.DistBackendError("ncclUnhandledCudaError: out of memory"), False),
        (RuntimeError("the loss is nan in step 3"), False),
        (ConfigError("dsaux.aux.transport: connection"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("timed out"), False),
    ],
)
def test_broken_connections_and_timeouts_are_consequences(error: BaseException, expected: bool) -> None:
    assert is_consequence(error) is expected


def test_a_process_that_nobody_collected_does_not_exist() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_exists(child.pid)
    child.kill()
    deadline = time.monotonic() + 20
    while process_exists(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process_exists(child.pid), "it has ended, and its parent has not asked yet"
    child.wait()
    assert not process_exists(child.pid)


def test_machine_is_the_same_for_all_processes_of_a_host() -> None:
    script = "from dsaux.watch_board import machine; print(machine())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == machine()


def test_the_place_of_a_thread_is_its_line_outside_the_libraries() -> None:
    _, place, waits = locate(main_thread_frames())
    assert place.startswith("watch_board.py:"), "the call that takes the frames is dsaux's own code"
    assert place.endswith("in main_thread_frames")
    assert not waits
    found = []

    def look() -> None:
        found.append(locate(main_thread_frames()))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert found[0][1].startswith("test_watch.py:")
    assert locate([]) == (0, "", False)


def fail_in_step(watch: Watch, *, threads: int) -> None:
    watch.progress(step=1, activity="training step", stage=0)
    assert threading.active_count() == threads
    raise ValueError("lost")


def test_with_one_process_the_watch_does_nothing() -> None:
    threads = threading.active_count()
    watch = Watch(Place(0, 0, 1, 1, "here"), timeout_s=60)
    with pytest.raises(ValueError, match="lost"), watch:
        fail_in_step(watch, threads=threads)
    stopped = watch.fail(ValueError("lost"))
    assert isinstance(stopped, RunFailedError)
    assert str(stopped).endswith("failed: ValueError: lost")


def test_a_sign_that_does_not_change_grows_old() -> None:
    peer = Seen(sign(1, beat=1, moves=1), heard_at=0.0, moved_at=0.0)
    peer.update(sign(1, beat=2, moves=1), now=5.0)
    assert (peer.heard_at, peer.moved_at) == (5.0, 0.0)
    peer.update(sign(1, beat=2, moves=1, is_done=True), now=6.0)
    assert (peer.heard_at, peer.moved_at, peer.sign.is_done) == (5.0, 0.0, True)


def test_a_sign_of_another_process_in_the_place_of_a_rank_is_not_taken() -> None:
    """Another run with the same port writes its signs here; its processes end without a word to this run."""
    peer = Seen(sign(1, beat=1), heard_at=0.0, moved_at=0.0)
    peer.update(replace(peer.sign, pid=peer.sign.pid + 1, beat=7, moves=9), now=5.0)
    assert (peer.heard_at, peer.moved_at, peer.sign) == (0.0, 0.0, sign(1, beat=1))
