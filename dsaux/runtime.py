"""Where this process stands among the others, and how a run ends. Used by train.py before and after everything else."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import glob
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from dsaux.config_rules import ConfigError
from dsaux.launchers import rank_text, read_launch
from dsaux.rendezvous import check_meeting_point, explain, meeting_point, time_limit

if TYPE_CHECKING:  # takes seconds to import: what is wrong with the input is said before
    import torch

EXIT_BAD_INPUT = 2
"""Exit code for wrong configuration, data or launch."""
EXIT_FAILED = 1
"""Exit code for a run that failed on the way."""
EXIT_STOPPED = 75
"""Exit code for a run that was asked to stop and has saved its state: start it again with --resume (EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Exit code for a run that was ended from the keyboard."""
FIRST_RANK_HEAD_START_S = 3.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_INT = 2**31 - 1


class Stopped(Exception):  # noqa: N818 - nothing has gone wrong
    """The run was asked to stop and has saved its state; the text says where."""


@dataclass(frozen=True)
class Place:
    """Rank of this process as the launcher set it.

    Attributes:
        rank: global rank.
        local_rank: rank on this host.
        world_size: number of processes.
        local_world_size: number of processes on this host.
        host: host name.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    host: str

    @classmethod
    def from_environment(cls) -> Place:
        """Read what the launcher says of this process, and say it again in the names that everything else reads.

        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set where they are missing.
        Under mpirun it is a collective call of all processes.

        Raises:
            ConfigError: if the variables are incomplete or contradict each other, or this process would train alone
                although it was started as one of several.
        """
        process = read_launch(os.environ)
        meeting_point(process, os.environ)
        values = {
            "RANK": process.rank,
            "WORLD_SIZE": process.world_size,
            "LOCAL_RANK": process.local_rank,
            "LOCAL_WORLD_SIZE": process.local_world_size,
        }
        os.environ.update({name: str(value) for name, value in values.items()})
        return cls(
            rank=process.rank,
            local_rank=process.local_rank,
            world_size=process.world_size,
            local_world_size=process.local_world_size,
            host=socket.gethostname(),
        )


def share_cores(place: Place) -> int:
    """Divide this host's cores among its processes, unless OMP_NUM_THREADS says otherwise.

    PyTorch takes all cores in every process: two ranks on two cores would then run four threads.

    Returns:
        Number of threads of this process.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_of_a_process(place.local_world_size))
    return torch.get_num_threads()


def cores_of_a_process(processes: int) -> int:
    """How many of this host's cores each of some processes gets: 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def start_process_group(timeout_s: float, *, quiet: bool = True) -> torch.device:
    """Join the other processes through DeepSpeed, with a timeout on every operation.

    Args:
        timeout_s: seconds after which a collective or transfer that nobody answers fails.
        quiet: keep DeepSpeed's log to warnings.

    Returns:
        The device of this process.

    Raises:
        ConfigError: if the processes do not come together within the timeout, or this one has no device.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    if quiet:
        logger.setLevel("WARNING")
        # Its schedules ask themselves for a rate before the first step, and warn of it, in every run.
        logger.addFilter(lambda record: "before it has started" not in record.getMessage())
    local_rank = int(os.environ["LOCAL_RANK"])
    _check_device(get_accelerator().device_name(), get_accelerator().device_count(), local_rank)
    check_meeting_point(is_first=os.environ["RANK"] == "0")
    try:
        with time_limit(timeout_s, lambda error: _leave(f"error: {error}", EXIT_BAD_INPUT)):
            deepspeed.init_distributed(
                dist_backend=get_accelerator().communication_backend_name(),
                timeout=timedelta(seconds=timeout_s),
                verbose=False,
            )
    except Exception as error:
        explained = explain(error, timeout_s=timeout_s)
        if explained is None:
            raise
        raise explained from error
    get_accelerator().set_device(local_rank)
    if get_accelerator().device_name() == "cpu":
        keep_freed_memory()
        torch.distributed.barrier()  # all ranks have opened each other's
        _unlink_shared_buffers()
    return torch.device(get_accelerator().device_name(local_rank))


def _check_device(kind: str, count: int, local_rank: int) -> None:
    if kind == "cuda" and local_rank >= count:
        raise ConfigError(
            f"this is process {local_rank + 1} of {socket.gethostname()}, but it sees {count} GPU{'s' * (count != 1)}. "
            "Start as many processes as GPUs on each host, and let all of them see all GPUs (Slurm: --gpus-per-node, "
            "not --gpus-per-task). Several stages on one GPU, to try: launchers/one_gpu.sh."
        )


def keep_freed_memory() -> bool:
    """Let the C library of this process keep the memory that tensors on the CPU have freed, for the next ones.

    By itself glibc gives the activations of a step back to the kernel, all or some as its heap happens to lie, and the
    next step pays for each page again: resnet56 at batch 128 in 4 micro-batches takes between nothing and 44,000 page
    faults a step, up to a tenth of its time, which differ from start to start.

    Returns:
        Whether it could be done: with glibc only.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(set_option(option, _LARGEST_INT) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def _unlink_shared_buffers() -> None:
    """Take the names from the shared memory that DeepSpeed has made for this rank on a CPU.

    It leaves 66 MB a rank behind in /dev/shm, under a name with the port, whatever way a process ends: some hundred
    runs fill the machine's memory. Without a name the memory goes with the last process that uses it.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for path in Path("/dev/shm").glob(f"deepspeed_*_{glob.escape(address)}_{port}_{os.environ['RANK']}"):
        path.unlink(missing_ok=True)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the GPU, or resident in the whole process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def stop_signals(act: Callable[[], None]) -> Iterator[list[str]]:
    """Within the block SIGTERM and SIGUSR1 call `act` and end nothing; batch systems send them before a time limit.

    Args:
        act: called in the main thread, between two instructions of Python; must only set a mark.

    Yields:
        Names of the signals that have come, in order.
    """
    names: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        act()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_and_exit(main: Callable[[], None]) -> None:
    """Run `main` and leave with 0, or print one clear line and leave with 2 (bad input), 1 (failure) or 75 (stopped).

    Every rank finds the same mistake in the configuration. Rank 0 says it; the others wait a moment, in which their
    launcher stops them, and speak only if nobody did: so a mistake that one rank alone can see is reported too.
    """
    try:
        main()
    except ConfigError as error:
        _leave(f"error: {error}", EXIT_BAD_INPUT)
    except Stopped as stop:
        _leave(str(stop), EXIT_STOPPED)
    except KeyboardInterrupt:
        _leave("interrupted", EXIT_INTERRUPTED)
    except BaseException as error:  # the last line of defence: say it, end the process, free the others
        if isinstance(error, SystemExit):
            raise
        from dsaux.checkpoint import CheckpointError
        from dsaux.watch_rules import DivergedError, RunFailedError

        if isinstance(error, (CheckpointError, DivergedError)):  # of a disk or of the training, not of the program
            _leave(f"error: {error}", EXIT_FAILED)

        if isinstance(error, RunFailedError):  # its text is the one story that all ranks tell
            if error.__cause__ is not None and not isinstance(error.__cause__, DivergedError):
                traceback.print_exception(error.__cause__)
            _leave(f"error: {error}", EXIT_FAILED)
        traceback.print_exc()
        _leave(f"error: {type(error).__name__}: {error}", EXIT_FAILED)
    _end()


def _end() -> NoReturn:
    """End a process that has done its work, with 0, as the interpreter does but for taking itself apart.

    A thread in the background (the watch, a loader, communication) that returns from native code into an interpreter
    that is half gone aborts the process with SIGABRT: a finished run would count as failed, now and then.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        # MPI's library signs off at mpirun in its exit handlers, although it is finalized: who ends without them counts
        # as lost, and mpirun kills the others. With Python's lock held, no thread comes back into the interpreter.
        ctypes.PyDLL(None).exit(0)
    os._exit(0)


def _leave(message: str, code: int) -> None:
    rank = rank_text(os.environ)  # as text: it may be what is wrong
    if rank != "0" and code in (EXIT_BAD_INPUT, EXIT_STOPPED):
        time.sleep(FIRST_RANK_HEAD_START_S)
    print(f"[rank {rank} on {socket.gethostname()}] {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: communication threads of a broken group could keep the interpreter from ending.
    os._exit(code)
