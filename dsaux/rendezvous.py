"""Where the processes of a run meet: address and port of rank 0, and what is said when they do not find each other.

Called by `dsaux.runtime` in two places: before anything initialises (`meeting_point`), and around the start of the
process group (`check_meeting_point`, `explain`).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import random
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, MutableMapping

from dsaux.config_rules import ConfigError
from dsaux.launchers import LaunchedProcess

_FIRST_PORT, _NUM_PORTS = 12_000, 20_000
"""Ports for jobs: below 32,768, where systems begin to hand out ports of their own."""
_PORT_TRIES = 50
_LAST_PORT = 65_535
_SCONTROL_LIMIT_S = 30.0
_GRACE_S = 5.0
"""How much longer than its timeout PyTorch may take: it comes back by itself in most cases."""


def meeting_point(process: LaunchedProcess, environment: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher has not; a collective call of all processes under mpirun.

    Args:
        process: this one.
        environment: where they are set, if missing.

    Raises:
        ConfigError: if the first host has no address, MASTER_PORT is no port, or MPI does not bring the processes
            together.
    """
    has_both = bool(environment.get("MASTER_ADDR") and environment.get("MASTER_PORT"))
    if process.launcher == "mpirun" and process.world_size > 1 and not has_both:
        address, port = _agree_by_mpi(process)
    elif process.launcher == "srun" and process.world_size > 1:
        assert process.first_host is not None, "read_launch gives it for srun"
        assert process.job is not None, "read_launch gives it for srun"
        address = environment.get("MASTER_ADDR") or _address_of(process.first_host)
        port = job_port(process.job)
    else:
        address, port = "127.0.0.1", 0
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = address
    if not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(port or free_port())
    text = environment["MASTER_PORT"]
    if not text.isdecimal() or not 1 <= int(text) <= _LAST_PORT:
        raise ConfigError(
            f"MASTER_PORT is {text!r}; it must be a port from 1 to {_LAST_PORT}. Set a free one on all ranks."
        )


def job_port(job: int) -> int:
    """The port of a job's step: the same on every rank, another one for the job beside it."""
    return _FIRST_PORT + job % _NUM_PORTS


def free_port() -> int:
    """A port of this host that nobody listens on.

    Below those that the system gives to connections of its own: one of these could be taken before rank 0 listens.
    """
    for _ in range(_PORT_TRIES):
        port = random.SystemRandom().randrange(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def check_meeting_point(*, is_first: bool) -> None:
    """Look at MASTER_ADDR and MASTER_PORT before anybody waits for them.

    Args:
        is_first: whether this is rank 0, which opens the port.

    Raises:
        ConfigError: if the port is in use, or the address is that of no host.
    """
    address, text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not _has_address(address):
        raise ConfigError(
            f"MASTER_ADDR is {address!r}, which is no host that {socket.gethostname()} knows. Set it to the name or "
            "address of rank 0's host on all ranks."
        )
    # torchrun's agent may hold the port for its workers.
    if is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _is_taken(int(text)):
        raise ConfigError(
            f"MASTER_PORT {text} is in use on {socket.gethostname()}: another run, or another program. Set a free port "
            "on all ranks (torchrun and deepspeed: --master_port), or end what holds it."
        )


def explain(error: Exception, *, timeout_s: float) -> ConfigError | None:
    """What it means that the processes have not come together; None for an error of another kind.

    Args:
        error: from the start of the process group.
        timeout_s: how long they had.
    """
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return ConfigError(
            f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on {socket.gethostname()}. Set a free one on all ranks."
        )
    if not _is_of_the_store(error):
        return None
    joined = re.search(r"(\d+)/(\d+) clients joined", text)
    came = f"only {joined[1]} of {joined[2]}" if joined else f"not all {os.environ['WORLD_SIZE']}"
    return _not_together(timeout_s, came=f"{came} processes met there")


@contextlib.contextmanager
def time_limit(timeout_s: float, give_up: Callable[[ConfigError], None]) -> Iterator[None]:
    """Within the block PyTorch has the timeout, and a little more, to come back; then `give_up` ends the process.

    PyTorch keeps its timeout where nobody listens, but waits without one for the answer of a program that listens on
    the port and never answers.

    Args:
        timeout_s: of the process group.
        give_up: called in a thread with what is to be said.
    """
    error = _not_together(timeout_s, came=f"not all {os.environ['WORLD_SIZE']} processes met there")
    timer = threading.Timer(timeout_s + _GRACE_S, give_up, [error])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_together(timeout_s: float, *, came: str) -> ConfigError:
    place, world_size = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", os.environ["WORLD_SIZE"]
    return ConfigError(
        f"the processes did not come together at MASTER_ADDR:MASTER_PORT {place} within dsaux.run.timeout_s "
        f"{timeout_s:g}: {came}. Check that rank 0 runs on that host, that {world_size} processes were started, that "
        "the port is open between the hosts and no other program holds it (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
        "names the network)."
    )


def _is_of_the_store(error: Exception) -> bool:
    from torch.distributed import DistNetworkError, DistStoreError

    return isinstance(error, DistNetworkError | DistStoreError | TimeoutError | ConnectionError)


def _is_taken(port: int) -> bool:
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    for kind in dict.fromkeys((family, socket.AF_INET)):
        try:
            with socket.socket(kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PyTorch's store does
                probe.bind(("", port))
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # a family that the host lacks is no matter
                return True
    return False


def _has_address(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _address_of(node: str) -> str:
    """A name or address of one of Slurm's nodes; its name is not always that of a host."""
    if _has_address(node):
        return node
    scontrol = shutil.which("scontrol")
    if scontrol is not None:
        done = subprocess.run(
            [scontrol, "--oneliner", "show", "node", node],
            capture_output=True,
            text=True,
            timeout=_SCONTROL_LIMIT_S,
            check=False,
        )
        found = re.search(r"NodeAddr=(\S+)", done.stdout)
        if found and _has_address(found[1]):
            return found[1]
    raise ConfigError(
        f"{node}, the first node of this job, is no host that {socket.gethostname()} knows, and scontrol knows no "
        "address of it either. Set MASTER_ADDR to that host's address before srun."
    )


def _agree_by_mpi(process: LaunchedProcess) -> tuple[str, int]:
    """Rank 0 chooses address and port and tells the others: the only thing that MPI is used for."""
    mend = "Install dsaux's extra mpi (pip install -e '.[mpi]'), or set MASTER_ADDR and MASTER_PORT (mpirun -genv)."
    try:
        # MPI is to start here and to end here, not when it is imported or when Python ends.
        importlib.import_module("mpi4py").rc(initialize=False, finalize=False)
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"mpirun started this process but mpi4py finds no MPI: {reason}. {mend}") from error
    is_ours = not mpi.Is_initialized()
    if is_ours:
        mpi.Init()
    world = mpi.COMM_WORLD
    if world.Get_size() != process.world_size or world.Get_rank() != process.rank:
        raise ConfigError(
            f"mpirun started {process.world_size} processes but mpi4py sees {world.Get_size()}: it has the library of "
            f"another MPI ({mpi.Get_library_version().split(',')[0].splitlines()[0]}) than this mpirun. Use the mpirun "
            "of that MPI, or set MASTER_ADDR and MASTER_PORT."
        )
    own = (_own_address(process), free_port()) if process.rank == 0 else None
    address, port = world.bcast(own, root=0)
    if is_ours:
        mpi.Finalize()
    return str(address), int(port)


def _own_address(process: LaunchedProcess) -> str:
    if process.local_world_size == process.world_size:
        return "127.0.0.1"
    names = [process.first_host or "", socket.gethostname()]
    return next((name for name in names if name and _has_address(name)), names[-1])
