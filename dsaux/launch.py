"""Write a batch script for given resources: `python -m dsaux.launch slurm --nodes 2 --gpus_per_node 8 --ds_config F`.

The script is `dsaux/templates/slurm.sbatch` (launchers/slurm.sbatch is a copy) with the resources at its head; that the
configuration fits them is checked before it is written.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dsaux.config import Launch, check_launch, load_config
from dsaux.config_rules import ConfigError
from dsaux.runtime import EXIT_BAD_INPUT

TEMPLATE = Path(__file__).parent / "templates" / "slurm.sbatch"
_LAST_OPTION = "--resume latest"
"""In the template: the last of train.py's options, before those of sbatch's command line."""
_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: 0 trains on CPUs.
        tasks_per_node: processes of each node, one a GPU where there are GPUs.
        cpus_per_task: cores of each process.
        time: limit, in Slurm's form.
        job_name: name of the job.
        partition: of the cluster; None takes its default.
        account: who pays; None takes the user's default.
    """

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int = 8
    time: str = "24:00:00"
    job_name: str = "dsaux"
    partition: str | None = None
    account: str | None = None


def slurm_script(resources: Resources, *, ds_config: str, overrides: Sequence[str] = ()) -> str:
    """The batch script.

    Args:
        resources: what to ask for.
        ds_config: configuration that it trains unless DS_CONFIG says otherwise.
        overrides: as of `load_config`; those of sbatch's command line come behind them.
    """
    options = {
        "job-name": resources.job_name,
        "partition": resources.partition,
        "account": resources.account,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.tasks_per_node,
        "gres": f"gpu:{resources.gpus_per_node}" if resources.gpus_per_node else None,
        "cpus-per-task": resources.cpus_per_task,
        "time": resources.time,
    }
    head = "".join(f"#SBATCH --{name}={value}\n" for name, value in options.items() if value is not None)
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(tuple(f"#SBATCH --{name}=" for name in options))]
    script = kept[0] + head + "".join(kept[1:])
    given = f': "${{DS_CONFIG:={_quoted(ds_config)}}}"'
    script = re.sub(r': "\$\{DS_CONFIG:=[^}]*\}"', lambda _: given, script, count=1)
    if overrides:
        sets = " ".join(f"--set {shlex.quote(override)}" for override in overrides)
        script = script.replace(f'{_LAST_OPTION} "$@"', f'{_LAST_OPTION} {sets} "$@"', 1)
    if resources.gpus_per_node == 0:
        script = script.replace("\nset -euo pipefail\n", "\nset -euo pipefail\nexport DS_ACCELERATOR=cpu\n", 1)
    return script


def _quoted(path: str) -> str:
    if any(mark in path for mark in '"$`\\}\n'):
        raise ConfigError(f"--ds_config {path} has a character that means something to a shell. Rename the file.")
    return path


def placement_note(launch: Launch, resources: Resources, *, placement: str) -> str | None:
    """A sentence where neighbouring ranks do not all find room on one node; None where they do."""
    name, group = ("pipeline", launch.stages) if placement == "stages_near" else ("stage's replicas", launch.replicas)
    if group == 1 or resources.tasks_per_node % group == 0 or resources.nodes == 1:
        return None
    return (
        f"note: with dsaux.pipeline.placement {placement} each {name} should share a node, but {group} do not divide "
        f"{resources.tasks_per_node} processes: some messages between neighbours cross nodes."
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Run python -m dsaux.launch slurm --help.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m dsaux.launch", description="Batch scripts for given resources.")
    commands = parser.add_subparsers(dest="command", required=True)
    slurm = commands.add_parser("slurm", help="a script for sbatch", allow_abbrev=False)
    slurm.add_argument("--nodes", type=int, required=True, metavar="N", help="how many machines the job asks for")
    slurm.add_argument(
        "--gpus_per_node",
        "--gpus-per-node",
        type=int,
        required=True,
        metavar="N",
        help="GPUs of each node, one process each; 0 trains on CPUs",
    )
    slurm.add_argument(
        "--tasks_per_node",
        "--tasks-per-node",
        "--ntasks-per-node",
        type=int,
        metavar="N",
        help="processes of each node, without GPUs (default: 1)",
    )
    slurm.add_argument("--ds_config", required=True, metavar="FILE", help="configuration that the job trains")
    slurm.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train.py, in every start")
    slurm.add_argument(
        "--cpus_per_task",
        "--cpus-per-task",
        type=int,
        default=Resources.cpus_per_task,
        metavar="N",
        help="cores of each process (default: %(default)s)",
    )
    slurm.add_argument(
        "--time",
        default=Resources.time,
        metavar="LIMIT",
        help="longest time of one start, such as 2-12:00:00 (default: %(default)s)",
    )
    slurm.add_argument(
        "--job_name",
        "--job-name",
        default=Resources.job_name,
        metavar="NAME",
        help="name of the job in the queue (default: %(default)s)",
    )
    slurm.add_argument("--partition", metavar="NAME", help="of the cluster's nodes (default: the cluster's own)")
    slurm.add_argument("--account", metavar="NAME", help="who pays for the job (default: your own)")
    slurm.add_argument("--out", metavar="FILE", help="where to write (default: standard output)")
    slurm.add_argument("--force", action="store_true", help="replace --out if it is there")
    return parser.parse_args(arguments)


def _resources(given: argparse.Namespace) -> Resources:
    for name in ("nodes", "cpus_per_task", "tasks_per_node"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ConfigError(f"--{name} is {getattr(given, name)}; it must be a whole number >= 1. Change it.")
    if given.gpus_per_node < 0:
        raise ConfigError(f"--gpus_per_node is {given.gpus_per_node}; it must be 0 (CPUs) or more. Change it.")
    if given.gpus_per_node and given.tasks_per_node not in (None, given.gpus_per_node):
        raise ConfigError(
            f"--tasks_per_node is {given.tasks_per_node} but --gpus_per_node {given.gpus_per_node}; there is one "
            "process a GPU. Leave --tasks_per_node out."
        )
    if not _TIME.fullmatch(given.time):
        raise ConfigError(
            f"--time is {given.time!r}; it must be a limit of Slurm's such as 24:00:00 or 2-12:00:00. Change it."
        )
    for name in ("job_name", "partition", "account"):
        value = getattr(given, name)
        if value is not None and (not value or shlex.quote(value) != value):
            raise ConfigError(f"--{name} is {value!r}; it must be a plain name. Change it.")
    return Resources(
        nodes=given.nodes,
        gpus_per_node=given.gpus_per_node,
        tasks_per_node=given.gpus_per_node or given.tasks_per_node or 1,
        cpus_per_task=given.cpus_per_task,
        time=given.time,
        job_name=given.job_name,
        partition=given.partition,
        account=given.account,
    )


def run(arguments: Sequence[str] | None = None) -> None:
    """Check, and write the script.

    Raises:
        ConfigError: if the resources are none, or the configuration does not fit them.
    """
    given = _parse(arguments)
    resources = _resources(given)
    config = load_config(given.ds_config, overrides=given.set)
    processes = resources.nodes * resources.tasks_per_node
    per_node = "gpus_per_node" if resources.gpus_per_node else "tasks_per_node"
    asked_by = f"--nodes {resources.nodes} x --{per_node} {resources.tasks_per_node}"
    launch = check_launch(config, world_size=processes, needs_data=False, asked_by=asked_by)
    script = slurm_script(resources, ds_config=given.ds_config, overrides=given.set)
    if given.out is None:
        sys.stdout.write(script)
    else:
        path = Path(given.out)
        if path.exists() and not given.force:
            raise ConfigError(f"--out {path} is there already. Give another path, or --force to replace it.")
        try:
            path.write_text(script, encoding="utf-8")
            path.chmod(0o755)
        except OSError as error:
            raise ConfigError(f"--out {given.out} cannot be written: {error.strerror}. Give another path.") from error
    where = f"{resources.nodes} node{'s' * (resources.nodes > 1)} x {resources.tasks_per_node}"
    shape = f"{launch.stages} stages x {launch.replicas} replica{'s' * (launch.replicas > 1)}"
    print(f"{where} processes: {shape}, micro-batch {launch.micro_batch_size}", file=sys.stderr)
    note = placement_note(launch, resources, placement=config.dsaux.pipeline.placement)
    if note:
        print(note, file=sys.stderr)


def main() -> None:
    """`python -m dsaux.launch`."""
    try:
        run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
