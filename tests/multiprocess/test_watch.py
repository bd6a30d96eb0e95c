"""One of three gloo ranks is killed, raises or hangs: the others end soon, non-zero, and say which one and why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import PRELOADED, free_port

pytestmark = pytest.mark.multiprocess

RANKS = 3
PERIOD_S = 0.2
START_LIMIT_S = 90.0
"""Until all ranks stand in the collective that one of them never joins."""
END_LIMIT_S = 20.0
"""Until all have ended from then on; the longest way, a lost store or a silent host, takes 5 to 10 s."""
STEP = 120


def run_with_watch(
    folder: Path, culprit: int, action: Callable[[Any], None], *, timeout_s: float = 60.0, knows_machine: bool = True
) -> tuple[list[int | None], list[str]]:
    """Start ranks in a watch; all but the culprit end up in an all-reduce, in which it calls `action` instead.

    Returns:
        Exit code and standard error of each rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    settings = (culprit, action, free_port(), str(folder), timeout_s, knows_machine)
    processes: list[BaseProcess] = []
    try:
        for rank in range(RANKS):
            processes.append(context.Process(target=_rank_main, args=(rank, *settings), daemon=True))
            processes[-1].start()
        wait_until(lambda: (folder / "started").exists() or not any(p.is_alive() for p in processes), START_LIMIT_S)
        others = [process for rank, process in enumerate(processes) if rank != culprit]
        wait_until(lambda: not any(process.is_alive() for process in others), END_LIMIT_S)
        processes[culprit].join(timeout=5.0)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes], [read_output(folder / str(rank)) for rank in range(RANKS)]


def read_output(path: Path) -> str:
    """What a rank wrote, without PyTorch's remark on a machine that has CUDA's compiler and no GPU."""
    return "".join(line for line in path.read_text().splitlines(keepends=True) if "No CUDA runtime" not in line)


def wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    """Return when the condition holds; go on without it at the limit, for the test to say what was found."""
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def say_when_read(watch: Any, rank: int, path: Path) -> None:
    """Make a file when a watch has read a rank's last sign: how soon it does, an overloaded machine decides."""

    def is_read() -> bool:
        seen = watch._seen.get(rank)
        return seen is not None and seen.sign.step == STEP

    wait_until(is_read, START_LIMIT_S)
    if is_read():
        path.touch()


def _rank_main(
    rank: int,
    culprit: int,
    action: Callable[[Any], None],
    port: int,
    folder: str,
    timeout_s: float,
    knows_machine: bool,
) -> None:
    os.dup2(os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    import torch

    import dsaux.watch
    from dsaux.runtime import Place, run_and_exit, start_process_group

    torch.set_num_threads(1)
    if not knows_machine:
        dsaux.watch.machine = lambda: ""

    def main() -> None:
        def record(text: str) -> None:
            Path(f"{folder}/record{rank}").write_text(text)

        with dsaux.watch.Watch(
            Place.from_environment(), timeout_s=timeout_s, on_stop=record, period_s=PERIOD_S
        ) as watch:
            if action is raise_before_the_group_stands and rank == culprit:
                action(watch)
            start_process_group(timeout_s)
            watch.progress(stage=rank)
            torch.distributed.barrier()
            watch.progress(step=STEP, activity="training step")
            if rank == culprit:
                others = [Path(f"{folder}/read{other}") for other in range(RANKS) if other != culprit]
                wait_until(lambda: all(path.exists() for path in others), START_LIMIT_S)
                Path(f"{folder}/started").touch()
                action(watch)
            threading.Thread(
                target=say_when_read, args=(watch, culprit, Path(f"{folder}/read{rank}")), daemon=True
            ).start()
            torch.distributed.all_reduce(torch.ones(1))
            threading.Event().wait(10 * PERIOD_S * rank)  # ranks end at different times

    run_and_exit(main)
    os._exit(0)


def be_killed(watch: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_stopped(watch: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_an_error(watch: Any) -> None:
    raise ValueError("image 7 can't be read")


def raise_before_the_group_stands(watch: Any) -> None:
    raise ValueError("the data are not there")


def run_out_of_memory(watch: Any) -> None:
    watch.progress(activity="evaluation")
    raise MemoryError


def hang(watch: Any) -> None:
    threading.Event().wait()


def do_nothing(watch: Any) -> None:
    return


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def who(rank: int, *, activity: str = "training step") -> str:
    return f"rank {rank} (host {socket.gethostname()}, stage {rank}, step {STEP}, {activity})"


def stopped(rank: int, cause: str) -> str:
    """The last line of a rank that ends because of another."""
    return f"[rank {rank} on {socket.gethostname()}] error: stopped because {cause}"


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("knows_machine", [True, False])
def test_a_killed_rank_is_named(tmp_path: Path, culprit: int, knows_machine: bool) -> None:
    codes, outputs = run_with_watch(tmp_path, culprit, be_killed, knows_machine=knows_machine)
    reason = "is gone: its process was killed" if knows_machine else "gave no sign of life for"
    if culprit == 0 and not knows_machine:
        reason = "cannot be reached: the process that holds the store is gone"
    for rank in {0, 1, 2} - {culprit}:
        assert codes[rank] == 1
        assert f"stopped because {who(culprit)} {reason}" in last_line(outputs[rank]), outputs[rank]
    assert codes[culprit] == -signal.SIGKILL


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_is_told_to_ranks_that_are_blocked(tmp_path: Path, culprit: int) -> None:
    codes, outputs = run_with_watch(tmp_path, culprit, raise_an_error)
    assert codes == [1, 1, 1]
    cause = f"{who(culprit)} failed: ValueError: image 7 can't be read"
    for rank in {0, 1, 2} - {culprit}:
        assert outputs[rank].splitlines() == [stopped(rank, cause)], "one line, no traceback"
        assert (tmp_path / f"record{rank}").read_text() == cause
    assert "in raise_an_error" in outputs[culprit]
    assert cause in last_line(outputs[culprit])


def test_a_rank_without_memory_is_named_with_the_mend(tmp_path: Path) -> None:
    codes, outputs = run_with_watch(tmp_path, 2, run_out_of_memory)
    assert codes == [1, 1, 1]
    for output in outputs:
        assert f"{who(2, activity='evaluation')} failed: out of memory. Lower train_batch_size" in last_line(output)


def test_an_error_before_the_process_group_stands_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    codes, outputs = run_with_watch(tmp_path, 1, raise_before_the_group_stands)
    assert codes == [1, 1, 1]
    for output in outputs:
        assert ", step 0, start) failed: ValueError: the data are not there" in last_line(output)


def test_a_rank_that_hangs_is_named_with_its_place(tmp_path: Path) -> None:
    codes, outputs = run_with_watch(tmp_path, 1, hang, timeout_s=5.0)
    assert codes == [1, 1, 1]
    for rank, output in enumerate(outputs):
        assert f"{who(1)} hangs at test_watch.py:" in last_line(output), output
        assert "in hang: no rank has made progress for " in last_line(output)
        assert ("The main thread of rank 1:" in output) == (rank == 1)
    assert "threading.Event().wait()" in outputs[1], "its stack"


def test_a_stopped_process_is_named(tmp_path: Path) -> None:
    codes, outputs = run_with_watch(tmp_path, 2, be_stopped, timeout_s=8.0)
    assert codes == [1, 1, -signal.SIGKILL], "a stopped process can't end by itself"
    for output in outputs[:2]:
        assert f"{who(2)} hangs at test_watch.py:" in last_line(output)


def test_ranks_that_end_at_different_times_say_nothing(tmp_path: Path) -> None:
    codes, outputs = run_with_watch(tmp_path, 0, do_nothing)
    assert codes == [0, 0, 0]
    assert outputs == ["", "", ""]


def test_a_rank_that_has_ended_does_not_miss_the_store_of_one_that_has(tmp_path: Path) -> None:
    """Rank 0 reads that rank 1 has ended and goes, with the store, before rank 1 has read that of rank 0."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    ranks = [context.Process(target=_end_main, args=(rank, port, str(tmp_path)), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    wait_until(lambda: not any(process.is_alive() for process in ranks), START_LIMIT_S)
    for process in ranks:
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0], read_output(tmp_path / "1")
    assert "error" not in read_output(tmp_path / "1")


def _end_main(rank: int, port: int, folder: str) -> None:
    os.dup2(os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    import dsaux.watch
    from dsaux.runtime import Place, run_and_exit, start_process_group
    from dsaux.watch_board import Board, process_exists

    class LateReader(Board):
        """Loses its core between its last word and its last look at the others', until rank 0 is gone."""

        def exchange(self, sign: Any, **others: Any) -> Any:
            first = super().exchange(sign, **others)
            if not sign.is_done:
                return first
            wait_until(lambda: not process_exists(int(Path(f"{folder}/pid").read_text())), START_LIMIT_S)
            return super().exchange(sign, **others)

    if rank == 0:
        Path(f"{folder}/pid").write_text(str(os.getpid()))
        dsaux.watch.LINGER_S = 1.0
    else:
        dsaux.watch.Board = LateReader  # type: ignore[misc]

    def main() -> None:
        with dsaux.watch.Watch(Place.from_environment(), timeout_s=60.0, period_s=PERIOD_S):
            start_process_group(60.0)
            torch.distributed.barrier()
            threading.Event().wait(5 * PERIOD_S)

    run_and_exit(main)
