"""Where this process stands among the others, and how a run ends. Used by train.py before and after everything else."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dsaux.config_rules import ConfigError

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
        """Read RANK, WORLD_SIZE, LOCAL_RANK as set by `deepspeed` or `torchrun`; without them this is the only process.

        Raises:
            ConfigError: if the variables are incomplete or contradict each other, or Slurm started several tasks
                that no launcher has joined.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = {name: os.environ[name] for name in names if name in os.environ}
        tasks = os.environ.get("SLURM_NTASKS", "1")
        if not given:
            if tasks.isdigit() and int(tasks) > 1 and "SLURM_PROCID" in os.environ:
                raise ConfigError(
                    f"Slurm started {tasks} tasks, but RANK, WORLD_SIZE and LOCAL_RANK are not set: each task would "
                    "train alone. Start train.py with torchrun or the deepspeed launcher."
                )
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", str(_free_port()))
            return cls(rank=0, local_rank=0, world_size=1, local_world_size=1, host=socket.gethostname())
        missing = [name for name in names if name not in given]
        if missing or not all(value.isdigit() for value in given.values()):
            raise ConfigError(
                f"the environment has {given} but needs RANK, WORLD_SIZE and LOCAL_RANK as whole numbers. Start "
                "train.py with deepspeed or torchrun, or unset all three to train in one process."
            )
        rank, world_size, local_rank = (int(given[name]) for name in names)
        if rank >= world_size:
            raise ConfigError(f"RANK is {rank} but WORLD_SIZE is {world_size}; ranks go from 0 to {world_size - 1}.")
        local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(world_size)))
        if not local.isdigit() or int(local) < 1:
            raise ConfigError(
                f"LOCAL_WORLD_SIZE (or LOCAL_SIZE) is {local!r}; it must be a whole number >= 1, the processes on this "
                "host. Start train.py with deepspeed or torchrun, or unset it."
            )
        return cls(rank, local_rank, world_size, int(local), socket.gethostname())


def share_cores(place: Place) -> int:
    """Divide this host's cores among its processes, unless OMP_NUM_THREADS says otherwise.

    PyTorch takes all cores in every process: two ranks on two cores would then run four threads.

    Returns:
        Number of threads of this process.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // place.local_world_size))
    return torch.get_num_threads()


def start_process_group(timeout_s: float, *, quiet: bool = True) -> torch.device:
    """Join the other processes through DeepSpeed, with a timeout on every operation.

    Args:
        timeout_s: seconds after which a collective or transfer that nobody answers fails.
        quiet: keep DeepSpeed's log to warnings.

    Returns:
        The device of this process.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    if quiet:
        logger.setLevel("WARNING")
        # Its schedules ask themselves for a rate before the first step, and warn of it, in every run.
        logger.addFilter(lambda record: "before it has started" not in record.getMessage())
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(), timeout=timedelta(seconds=timeout_s), verbose=False
    )
    local_rank = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(local_rank)
    if get_accelerator().device_name() == "cpu":
        torch.distributed.barrier()  # all ranks have opened each other's
        _unlink_shared_buffers()
    return torch.device(get_accelerator().device_name(local_rank))


def _unlink_shared_buffers() -> None:
    """Take the names from the shared memory that DeepSpeed has made for this rank on a CPU.

    It leaves 66 MB a rank behind in /dev/shm, under a name with the port, whatever way a process ends: some hundred
    runs fill the machine's memory. Without a name the memory goes with the last process that uses it.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for path in Path("/dev/shm").glob(f"deepspeed_*_{address}_{port}_{os.environ['RANK']}"):
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
        from dsaux.watch_rules import RunFailedError

        if isinstance(error, CheckpointError):  # of a disk, not of the program
            _leave(f"error: {error}", EXIT_FAILED)

        if isinstance(error, RunFailedError):  # its text is the one story that all ranks tell
            if error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            _leave(f"error: {error}", EXIT_FAILED)
        traceback.print_exc()
        _leave(f"error: {type(error).__name__}: {error}", EXIT_FAILED)


def _leave(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")  # as text: it may be what is wrong
    if rank != "0" and code in (EXIT_BAD_INPUT, EXIT_STOPPED):
        time.sleep(FIRST_RANK_HEAD_START_S)
    print(f"[rank {rank} on {socket.gethostname()}] {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: communication threads of a broken group could keep the interpreter from ending.
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
