"""What the variables of each launcher mean, alone and within each other, and what is refused."""

from __future__ import annotations

import pytest

from dsaux.config import ConfigError
from dsaux.hostlist import expand_counts, expand_hosts
from dsaux.launchers import LaunchedProcess, rank_text, read_launch

MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
STEP = {  # as srun --nodes=2 --ntasks-per-node=2 sets them for the fourth task
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
BATCH = {  # as the script of sbatch --nodes=2 --ntasks-per-node=2 has them
    "SLURM_JOB_ID": "17",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
AGENTS = {**STEP, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
AGENT_1 = {**AGENTS, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
AGENT_0 = {**AGENTS, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_HOSTNAME": "n2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    **MASTER,
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_SIZE": "2",
    **MASTER,
}
ALONE_TORCHRUN = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (DEEPSPEED, "deepspeed"),
        (MPICH, "mpirun"),
        (OPEN_MPI, "mpirun"),
        (STEP, "srun"),
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, "srun"),  # srun --mpi=pmi2
        ({**AGENT_1, **MPICH}, "mpirun"),  # mpirun in a job lets srun start its helpers
        ({**AGENT_1, **OPEN_MPI}, "mpirun"),
        ({**AGENT_1, **TORCHRUN}, "torchrun"),  # one torchrun a node
        ({**AGENT_1, **DEEPSPEED}, "deepspeed"),
        ({**BATCH, **TORCHRUN}, "torchrun"),  # from the batch script
        ({**BATCH, **DEEPSPEED}, "deepspeed"),
        ({**STEP, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}, "RANK"),
        ({**MPICH, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MASTER}, "RANK"),
    ],
)
def test_every_launcher_gives_the_same_place(variables: dict[str, str], launcher: str) -> None:
    process = read_launch(variables)
    assert process.launcher == launcher
    assert (process.rank, process.world_size, process.local_rank, process.local_world_size) == (3, 4, 1, 2)


def test_without_a_launcher_there_is_one_process() -> None:
    alone = LaunchedProcess("python", rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert read_launch({}) == alone
    assert read_launch({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == alone
    assert read_launch({"SLURM_NTASKS": "4"}) == alone, "an sbatch option in a shell outside of any job"


def test_srun_names_the_first_host_and_a_number_for_the_port() -> None:
    process = read_launch(STEP)
    assert process.first_host == "n1"
    assert process.job == 17 * 8 + 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (BATCH, "for 4 tasks .* would train alone"),
        ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4"}, "for 4 tasks"),  # the shell of salloc
        ({**BATCH, "SLURM_STEP_ID": "4294967290"}, "for 4 tasks"),  # salloc with an interactive step
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "srun sets SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "five"}, "all as whole numbers"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "5"}, "contradict each other"),
        ({**STEP, "SLURM_PROCID": "4"}, "below the number of processes"),
        ({**STEP, "SLURM_LOCALID": "2"}, "below the number of processes"),
        ({**STEP, "SLURM_NODEID": "2"}, "contradict each other"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "two"}, "no list of counts"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are not set"),
        ({"PMI_RANK": "0"}, "mpirun sets PMI_RANK, PMI_SIZE"),
        ({**MPICH, "PMI_RANK": "4"}, "below the number of processes"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": ""}, "mpirun sets OMPI_COMM_WORLD_RANK"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "WORLD_SIZE is 4 but MASTER_PORT is not set"),
    ],
)
def test_variables_that_are_incomplete_or_contradict_each_other_are_refused(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_launch(variables)


@pytest.mark.parametrize("local_rank", [0, 1])
@pytest.mark.parametrize("agent", [AGENT_0, AGENT_1])
def test_two_launchers_at_once_are_refused_on_every_rank(agent: dict[str, str], local_rank: int) -> None:
    rank = str(local_rank)
    torchrun = {**ALONE_TORCHRUN, "RANK": rank, "LOCAL_RANK": rank}
    deepspeed = {**DEEPSPEED, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "CROSS_SIZE": "1"}
    mpirun = {"PMI_RANK": rank, "PMI_SIZE": "2", "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": "2"}
    for inner in (torchrun, deepspeed, mpirun):
        with pytest.raises(ConfigError, match="two launchers at once: srun started 2 tasks"):
            read_launch({**agent, **inner})
    outer = {"PMI_RANK": agent["SLURM_PROCID"], "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    with pytest.raises(ConfigError, match="two launchers at once: mpirun started 2 tasks"):
        read_launch({**outer, **torchrun})


def test_ranks_of_another_order_than_sruns_are_refused() -> None:
    with pytest.raises(ConfigError, match="two launchers at once"):
        read_launch({**STEP, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})


def test_a_message_has_the_rank_of_whoever_started_the_process() -> None:
    assert [rank_text(variables) for variables in (TORCHRUN, MPICH, OPEN_MPI, STEP, {})] == ["3", "3", "3", "3", "0"]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-2,5]", ["n1", "n2", "n5"]),
        ("gpu[08-10],login", ["gpu08", "gpu09", "gpu10", "login"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
    ],
)
def test_a_list_of_hosts_is_written_out(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[2-1]", "n[a]", "n[]"])
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        expand_hosts(text)


def test_counts_are_written_out() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
