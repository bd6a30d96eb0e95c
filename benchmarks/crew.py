"""The processes of one contestant: they wait for orders and measure blocks of steps, from barrier to barrier.

Every contestant has processes of its own, so that neither memory nor a library's state is shared. All are started
before the first measurement; only the one that has an order works, the others are stopped (SIGSTOP): gloo's threads
wake up a hundred times a second each, and those of twenty waiting processes took a tenth of the cores. So contestants
can take turns block by block, and a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from contestants import CONTESTANTS, GAUGES, Runner, Seat
from work import Work

from dsaux.rendezvous import free_port

TIMEOUT_S = 300
KEPT_STEPS = 2
"""Steps of a block whose sleeps are handed over, where asked for."""
PRELOADED = ("torch", "deepspeed", "dsaux.engine", "dsaux.bootstrap", "work")
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Team:
    """Who works, and where.

    Attributes:
        contestant: a name in `CONTESTANTS` or `GAUGES`.
        ranks: number of processes.
        threads: PyTorch's threads in a process. One: the rank is pinned to a core of its own, as far as there are any.
        make_work: makes the work; called in every process.
        namespaces: network namespace of each rank, for ranks on hosts of their own; empty for this machine's own.
        address: of rank 0.
        interface: whose bytes are counted, and that gloo uses.
    """

    contestant: str
    ranks: int
    make_work: Callable[[], Work]
    threads: int = 1
    namespaces: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"


@dataclass(frozen=True)
class Order:
    """One block of steps.

    Attributes:
        micro_batches: micro-batches in a step.
        bounds: where the network is cut, for `Seat`.
        warmup: steps before, behind the fill.
        steps: measured.
        keeps_intervals: whether to hand over when each sleeping layer slept, in the first two steps.
    """

    micro_batches: int
    bounds: tuple[int, ...]
    warmup: int
    steps: int
    keeps_intervals: bool = False


@dataclass(frozen=True)
class Window:
    """What one rank did in one measured block.

    Attributes:
        window_s: from barrier to barrier.
        cpu_s: processor time of the process, all its threads.
        slept_s: slept in sleeping layers.
        interface_bytes: that left by the interface and, where it is no loopback, that came in.
        peak_memory_bytes: largest resident memory of the process in the block, libraries included.
        loss: of the last step, None where the rank computes none.
        terms_s: where the time went, by name, for contestants that know it.
        intervals: start and end of each sleep in seconds from the window's start, and its kind; where asked for.
    """

    window_s: float
    cpu_s: float
    slept_s: float
    interface_bytes: int
    peak_memory_bytes: int
    loss: float | None
    terms_s: dict[str, float] = field(default_factory=dict)
    intervals: list[tuple[float, float, str]] = field(default_factory=list)


class CrewError(RuntimeError):
    """A rank of a contestant failed; the text says which one and why."""


class Crew:
    """The processes of a team, a context; they are ended behind the block.

    Args:
        team: who works.
    """

    def __init__(self, team: Team) -> None:
        self.team = team
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(team.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(theirs, team, rank, port), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def block(self, order: Order) -> list[Window]:
        """Measure a block; one window for each rank, in rank order.

        Raises:
            CrewError: if a rank failed or did not answer within the timeout.
        """
        self._signal(signal.SIGCONT)
        try:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # one that died before is found below
                    connection.send(order)
            return self._windows()
        finally:
            self._signal(signal.SIGSTOP)

    def _windows(self) -> list[Window]:
        """What the ranks answer to an order."""
        windows: list[Window | None] = [None] * self.team.ranks
        deadline = time.monotonic() + TIMEOUT_S
        while None in windows:
            waiting = {self._connections[rank]: rank for rank, window in enumerate(windows) if window is None}
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise CrewError(f"{self.team.contestant}: ranks {sorted(waiting.values())} gave no answer in time")
            for connection in ready:
                rank = waiting[connection]
                try:
                    answer = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    answer = f"exit code {self._processes[rank].exitcode}"
                if isinstance(answer, str):
                    raise CrewError(f"{self.team.contestant}, rank {rank}: {answer}")
                windows[rank] = answer
        return [window for window in windows if window is not None]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, number)


def preload() -> None:
    """Let the server of processes import the libraries once; called before the first crew."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    multiprocessing.set_forkserver_preload(list(PRELOADED))


# ---- in a rank ------------------------------------------------------------------------------------------------------


def _rank_main(connection: Any, team: Team, rank: int, port: int) -> None:
    _end_with_the_benchmark()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # libraries that print
            _serve(connection, team, rank, port)
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(traceback.format_exc())
    sys.stderr.flush()
    os._exit(0)  # threads of communication could keep or break the interpreter's own end


def _end_with_the_benchmark() -> None:
    """A stopped process does not notice that nobody is left to wake it up: the kernel ends it with its server.

    The server ends when nobody holds the other end of a pipe, of which multiprocessing gives every process a copy, for
    servers' processes that it might start in turn; ranks start none.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


def _serve(connection: Any, team: Team, rank: int, port: int) -> None:
    if team.namespaces:
        enter_namespace(team.namespaces[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = team.interface
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": team.ranks, "LOCAL_WORLD_SIZE": team.ranks}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR=team.address)
    os.environ["MASTER_PORT"] = str(port)
    cores = sorted(os.sched_getaffinity(0))
    if team.threads == 1:
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(team.threads)
    from dsaux.runtime import start_process_group

    start_process_group(timeout_s=TIMEOUT_S)
    work = team.make_work()
    runners: dict[int, Runner] = {}
    while (order := connection.recv()) is not None:
        if order.micro_batches not in runners:
            seat = Seat(rank, team.ranks, order.micro_batches, order.bounds, torch.device("cpu"))
            contestant = CONTESTANTS.get(team.contestant) or GAUGES[team.contestant]
            runners[order.micro_batches] = contestant.build(work, seat)
        connection.send(measure(runners[order.micro_batches], order, work=work, interface=team.interface))


def measure(runner: Runner, order: Order, *, work: Work, interface: str) -> Window:
    """Warm up, fill, measure from barrier to barrier, drain; a collective call of all ranks."""
    give_memory_back()
    for _ in range(runner.fill + order.warmup):
        runner.step()
    reset_peak_memory()
    slept_s, loss, intervals = _slept_s(work), None, []
    terms_s = dict(getattr(runner, "terms_s", {}))
    _forget_intervals(work)
    torch.distributed.barrier()
    sent, cpu_s, started = interface_bytes(interface), time.process_time(), time.perf_counter()
    for step in range(order.steps):
        loss = runner.step()
        if order.keeps_intervals and step == min(KEPT_STEPS, order.steps) - 1:
            intervals = _intervals(work, since=started)
    cpu_s = time.process_time() - cpu_s  # without the barrier, in which a rank may wait for a slower one
    torch.distributed.barrier()
    window = Window(
        window_s=time.perf_counter() - started,
        cpu_s=cpu_s,
        slept_s=_slept_s(work) - slept_s,
        interface_bytes=interface_bytes(interface) - sent,
        peak_memory_bytes=peak_memory_bytes(),
        loss=None if loss is None else float(loss),
        intervals=intervals,
        terms_s={name: value - terms_s.get(name, 0.0) for name, value in getattr(runner, "terms_s", {}).items()},
    )
    runner.drain()
    return window


def _slept_s(work: Work) -> float:
    return 0.0 if work.sleeper is None else work.sleeper.slept_s


def _intervals(work: Work, *, since: float) -> list[tuple[float, float, str]]:
    if work.sleeper is None:
        return []
    return [(round(start - since, 5), round(end - since, 5), kind) for start, end, kind in work.sleeper.intervals]


def _forget_intervals(work: Work) -> None:
    if work.sleeper is not None:
        work.sleeper.intervals.clear()


def interface_bytes(interface: str) -> int:
    """Bytes that have passed an interface of this process's network: sent, and received where it is no loopback."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, colon, counters = line.partition(":")
        if colon and name.strip() == interface:
            values = [int(value) for value in counters.split()]
            return values[8] + (0 if interface == "lo" else values[0])
    raise RuntimeError(f"there is no network interface {interface!r} here")


def give_memory_back() -> None:
    """Give what this process has freed and kept (`dsaux.runtime.keep_freed_memory`) back to the kernel.

    Else a block's peak would be that of the largest block before it, with another number of micro-batches.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Let the kernel count the largest resident memory of this process anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Largest resident memory of this process since :func:`reset_peak_memory`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def enter_namespace(name: str) -> None:
    """Move this process, which has one thread and no socket yet, into a named network namespace.

    Raises:
        OSError: if that is not possible.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}", encoding="ascii") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns({name}): {os.strerror(ctypes.get_errno())}")
