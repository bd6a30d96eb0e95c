"""What each launcher says of a process, read in one place: `deepspeed`, `torchrun`, `mpirun`, `srun`, or none.

`dsaux.runtime.Place.from_environment` calls `read_launch` before anything initialises. It looks at variables alone:

    launcher             rank, processes                     on this host                       who gives the address
    deepspeed, torchrun  RANK WORLD_SIZE                     LOCAL_RANK LOCAL_(WORLD_)SIZE      MASTER_ADDR MASTER_PORT
    mpirun (MPICH)       PMI_RANK PMI_SIZE                   MPI_LOCALRANKID MPI_LOCALNRANKS    MPI, one broadcast
    mpirun (Open MPI)    OMPI_COMM_WORLD_RANK ..._SIZE       ..._LOCAL_RANK ..._LOCAL_SIZE      MPI, one broadcast
    srun                 SLURM_PROCID SLURM_STEP_NUM_TASKS   SLURM_LOCALID, tasks of the node   first host, job number
    none                 0 of 1                              0 of 1                             this host

Where two of them are there, one may have started the other (a torchrun on each node by srun): the counts tell. Whatever
does not add up is refused, so that no process can train alone by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsaux.config_rules import ConfigError
from dsaux.hostlist import expand_counts, expand_hosts

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers the steps of srun from 0; batch script, interactive shell and the like have numbers from here on."""
_MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class LaunchedProcess:
    """One process as its launcher sees it.

    Attributes:
        launcher: "deepspeed", "torchrun", "mpirun", "srun", "python", or "RANK" for variables set by other means.
        rank: among all processes.
        world_size: processes.
        local_rank: among those of this host.
        local_world_size: processes of this host.
        agents: launchers that work together, one a host (torchrun, deepspeed); None where that is unknown.
        first_host: host of rank 0, where the launcher names it.
        job: number of the job, where there is one: all ranks derive a port from it.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    agents: int | None = None
    first_host: str | None = None
    job: int | None = None


def read_launch(environment: Mapping[str, str]) -> LaunchedProcess:
    """Find out who started this process, and check that everything that is said of it adds up.

    Args:
        environment: variables of the process.

    Raises:
        ConfigError: if variables are missing or contradict each other, if two launchers started the same processes, or
            if there should be more processes than this one.
    """
    step, mpi = _read_step(environment), _read_mpi(environment)
    if any(name in environment for name in RANK_NAMES):
        own = _read_ranks(environment)
        for outer in (step, mpi):
            if outer is not None:
                _check_started_by(outer, own)
        return own
    if mpi is not None:
        _check_mpi_in_step(mpi, step)
        return mpi
    if step is not None:
        return step
    _check_is_meant_alone(environment)
    return LaunchedProcess("python", rank=0, world_size=1, local_rank=0, local_world_size=1)


def rank_text(environment: Mapping[str, str]) -> str:
    """Rank for a message, as whoever started this process set it; "0" where nobody did. Never fails."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((environment[name] for name in names if name in environment), "0")


def _read_ranks(environment: Mapping[str, str]) -> LaunchedProcess:
    given = {name: environment[name] for name in RANK_NAMES if name in environment}
    if len(given) < len(RANK_NAMES) or not all(value.isdecimal() for value in given.values()):
        raise ConfigError(
            f"the environment has {given} but needs RANK, WORLD_SIZE and LOCAL_RANK as whole numbers. Start "
            "train.py with deepspeed, torchrun, mpirun or srun, or unset all three to train in one process."
        )
    rank, world_size, local_rank = (int(given[name]) for name in RANK_NAMES)
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank} but WORLD_SIZE is {world_size}; ranks go from 0 to {world_size - 1}.")
    local = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", str(world_size)))
    if not local.isdecimal() or int(local) < 1:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE (or LOCAL_SIZE) is {local!r}; it must be a whole number >= 1, the processes on this "
            "host. Start train.py with deepspeed or torchrun, or unset it."
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, "
            "so the processes cannot find each other. Start train.py with deepspeed or torchrun, or set the address of "
            "rank 0's host and a free port on all ranks."
        )
    kinds = {"GROUP_WORLD_SIZE": "torchrun", "CROSS_SIZE": "deepspeed"}
    name = next((name for name in kinds if environment.get(name, "").isdecimal()), None)
    return LaunchedProcess(
        kinds[name] if name else "RANK",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=int(local),
        agents=int(environment[name]) if name else None,
    )


def _read_mpi(environment: Mapping[str, str]) -> LaunchedProcess | None:
    for names in _MPI_NAMES:
        if names[0] not in environment:
            continue
        if "SLURM_STEP_ID" in environment and names[2] not in environment:
            return None  # srun offers its tasks MPI's rank as well (--mpi=pmi2): it is the launcher
        rank, world_size, local_rank, local_world_size = _numbers(environment, names, launcher="mpirun")
        _check_order(names, (rank, world_size, local_rank, local_world_size))
        host = environment.get("PMI_HOSTNAME") if rank == 0 else None
        return LaunchedProcess("mpirun", rank, world_size, local_rank, local_world_size, first_host=host)
    return None


def _read_step(environment: Mapping[str, str]) -> LaunchedProcess | None:
    """A task of srun; None outside of Slurm, in a batch script and in an interactive shell."""
    number = environment.get("SLURM_STEP_ID", "")
    is_step = number.isdecimal() and int(number) < _FIRST_SPECIAL_STEP
    if not is_step and environment.get("SLURM_PROCID", "0") == "0":
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    rank, world_size, local_rank, node = _numbers(
        environment, ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_NODEID"), launcher="srun"
    )
    per_node = _first(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    counts = expand_counts(per_node)
    if sum(counts) != world_size or node >= len(counts):
        raise ConfigError(
            f"Slurm's variables contradict each other: {tasks} is {world_size} and SLURM_NODEID {node}, but the tasks "
            f"by node are {per_node}. Start train.py with srun, and change none of its variables."
        )
    _check_order(
        ("SLURM_PROCID", tasks, "SLURM_LOCALID", "tasks of this node"), (rank, world_size, local_rank, counts[node])
    )
    job = environment.get("SLURM_JOB_ID", "0")
    return LaunchedProcess(
        "srun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=counts[node],
        first_host=expand_hosts(_first(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))[0],
        job=(int(job) if job.isdecimal() else 0) * 8 + (int(number) if is_step else 0),
    )


def _check_started_by(outer: LaunchedProcess, own: LaunchedProcess) -> None:
    """Refuse processes with RANK and so on that mpirun or srun started several times over."""
    if outer.world_size == 1 or own.agents == outer.world_size:  # all of them, or one launcher on each host
        return
    if own.agents is None and (own.rank, own.world_size) == (outer.rank, outer.world_size):
        return  # the same ranks under two names
    inner = own.launcher if own.agents else f"with RANK {own.rank} and WORLD_SIZE {own.world_size}"
    joined = f"of {own.agents} host{'s' if own.agents != 1 else ''}" if own.agents else "of another count or order"
    raise ConfigError(
        f"two launchers at once: {outer.launcher} started {outer.world_size} tasks, and in each train.py was started "
        f"{inner}, in a run {joined}: several runs would train side by side. Start train.py with {outer.launcher} "
        f"alone, or one {own.launcher if own.agents else 'torchrun'} a host that knows of all hosts."
    )


def _check_mpi_in_step(mpi: LaunchedProcess, step: LaunchedProcess | None) -> None:
    # In a job of Slurm's, mpirun lets srun start one helper on each host: the processes are those helpers' children.
    if step is not None and step.world_size > 1 and mpi.local_world_size == mpi.world_size:
        raise ConfigError(
            f"two launchers at once: srun started {step.world_size} tasks, and each of them an mpirun of "
            f"{mpi.world_size} process{'es' if mpi.world_size > 1 else ''} on its own host. Start train.py with srun "
            "alone, or mpirun from the batch script without srun."
        )


def _check_is_meant_alone(environment: Mapping[str, str]) -> None:
    """Refuse plain `python train.py` in an allocation for several tasks."""
    text = environment.get("SLURM_NTASKS", "1")
    if text == "1" or ("SLURM_JOB_ID" not in environment and "SLURM_PROCID" not in environment):
        return
    raise ConfigError(
        f"this is a job of Slurm's for {text} tasks (SLURM_NTASKS), but train.py was started as a single process, "
        f"which would train alone. Start srun python train.py ... in the job (launchers/slurm.sbatch does), or "
        "deepspeed or torchrun; for one process on purpose srun --ntasks=1 python train.py ..."
    )


def _numbers(environment: Mapping[str, str], names: tuple[str, str, str, str], *, launcher: str) -> tuple[int, ...]:
    given = {name: environment[name] for name in names if name in environment}
    if len(given) < len(names) or not all(value.isdecimal() for value in given.values()):
        raise ConfigError(
            f"the environment has {given} but {launcher} sets {', '.join(names)}, all as whole numbers. Start train.py "
            f"with {launcher} and leave its variables as they are, or unset them to train in one process."
        )
    return tuple(int(given[name]) for name in names)


def _check_order(names: tuple[str, str, str, str], values: tuple[int, int, int, int]) -> None:
    rank, world_size, local_rank, local_world_size = values
    if rank >= world_size or local_rank >= local_world_size or local_world_size > world_size:
        said = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        raise ConfigError(
            f"the launcher's variables contradict each other: {said}. A rank must be below the number of processes. "
            "Leave these variables as the launcher sets them."
        )


def _first(environment: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environment.get(name):
            return environment[name]
    raise ConfigError(
        f"this is a task of Slurm's, but {' and '.join(names)} are not set. Start train.py with srun, and change none "
        "of its variables."
    )
