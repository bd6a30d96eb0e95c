"""Train a network with dsaux: `deepspeed --num_gpus 2 train.py --ds_config ds_configs/quickstart.json`.

The run in the order of its path, one call a step. Everything that can be wrong with the input is found before the first
process group starts.
"""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from dsaux.checkpoint import find_checkpoint
from dsaux.config import Config, ConfigError, check_launch, load_config
from dsaux.config_rules import suggestion
from dsaux.resume import LATEST, check_start, config_of, plan_start
from dsaux.run_lock import lock_run
from dsaux.runtime import Place, run_and_exit, share_cores, start_process_group
from dsaux.watch import Watch


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # As any other wrong input: one line from rank 0, not a usage text from every rank.
        raise ConfigError(f"{message}. Run python train.py --help.")


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: if an option is unknown, lacks its value or is missing.
    """
    parser = _Parser(description="Layer-parallel training with dsaux.", allow_abbrev=False)
    parser.add_argument(
        "--ds_config",
        metavar="FILE",
        help="DeepSpeed JSON with a dsaux block; may be left out where --resume, or --run_dir with --eval_only, names "
        "a run",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the file, e.g. --set dsaux.aux.beta=30; may be repeated",
    )
    parser.add_argument("--run_dir", metavar="DIR", help="run folder (default: runs/<dsaux.run.name>, numbered)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="DIR|latest",
        help="go on from the newest whole checkpoint of a run folder, or from one checkpoint; latest (or no value): of "
        "--run_dir or of the newest run of this name, from the beginning where there is none",
    )
    parser.add_argument(
        "--dry_run",
        nargs="?",
        const="",
        metavar="PROCESSES",
        help="build everything, print the partition, the AuxNet's share, step and memory predicted for that many "
        "processes (default: those that were started; of a single one, one for each stage), and train nothing",
    )
    parser.add_argument("--eval_only", action="store_true", help="evaluate the network saved in --run_dir")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    arguments, unknown = parser.parse_known_args()
    if unknown:
        options = ["--ds_config", "--set", "--run_dir", "--resume", "--dry_run", "--eval_only"]
        raise ConfigError(f"{unknown[0]} is not an option of train.py. {suggestion(unknown[0], options)}")
    arguments.dry_run = _processes(arguments.dry_run)
    if arguments.eval_only and arguments.run_dir is None:
        raise ConfigError("--eval_only needs --run_dir. Give the folder of a run that has saved a checkpoint.")
    if arguments.eval_only and arguments.resume is not None:
        raise ConfigError("--eval_only evaluates and --resume trains. Leave one of them out.")
    if arguments.ds_config is None and (arguments.resume is not None or arguments.eval_only):
        arguments.ds_config = config_of(arguments.resume, run_dir=arguments.run_dir)
        if arguments.ds_config is None:
            raise ConfigError(
                f"{arguments.resume or ''} {arguments.run_dir or ''}".strip()
                + " is no run folder, or has no config.json "
                "in it. Give the folder of a run, or --ds_config as well."
            )
    if arguments.ds_config is None:
        raise ConfigError(
            "--ds_config is missing. Give a file, e.g. --ds_config ds_configs/quickstart.json; --resume, or --run_dir "
            "with --eval_only, takes the one of the run."
        )
    return arguments


def _processes(given: str | None) -> int | None:
    """The number of a dry run: 0 where none is given, None where it is no dry run."""
    if not given:
        return None if given is None else 0
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"--dry_run is {given}; it must be a whole number >= 1, the processes. Change it.")
    return int(given)


def show_dry_run(config: Config, place: Place, *, processes: int) -> None:
    """Print what a run of this configuration would be; the work of rank 0.

    Args:
        config: the checked configuration.
        place: this process among those that were started.
        processes: of the run; 0 for those that were started, and one for each stage where that is a single one.
    """
    started = config.dsaux.pipeline.stages if place.world_size == 1 else place.world_size
    asked_by = f"--dry_run {processes}" if processes else None
    launch = check_launch(config, world_size=processes or started, needs_data=False, asked_by=asked_by)
    if place.rank != 0:
        return
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says so
    from dsaux.dry_run import plan, show

    share_cores(Place(0, 0, 1, min(launch.world_size, os.cpu_count() or 1), place.host))
    show(plan(config, launch, device=torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def main() -> None:
    """One run, from the command line to the last line of its log."""
    arguments = parse_arguments()
    place = Place.from_environment()
    config = load_config(arguments.ds_config, overrides=arguments.set)
    if arguments.dry_run is not None:
        show_dry_run(config, place, processes=arguments.dry_run)
        return
    launch = check_launch(config, world_size=place.world_size)
    start = plan_start(arguments.resume, run_dir=arguments.run_dir, name=config.dsaux.run.name)

    from dsaux.data import load_dataset
    from dsaux.report import open_report

    lock = lock_run(start.run_dir, is_first=place.rank == 0)
    found = check_start(start, config, launch, is_first=place.rank == 0)
    report = open_report(
        config, place=place, run_dir=arguments.run_dir, eval_only=arguments.eval_only, start=start, lock=lock
    )
    if arguments.eval_only:
        config = config.without_auxnet()
        found = find_checkpoint(Path(arguments.run_dir)) if place.rank == 0 else None
    with report, Watch(place, timeout_s=config.dsaux.run.timeout_s, on_stop=report.failed) as watch:
        dataset = load_dataset(config.dsaux.data)
        share_cores(place)
        quiet = not config.deepspeed.get("wall_clock_breakdown", False)
        device = start_process_group(config.dsaux.run.timeout_s, quiet=quiet)

        from dsaux.assemble import agree_on_partition, build_engine, network_layers, tell_all
        from dsaux.trainer import Trainer, planned_steps

        layers = network_layers(config, dataset)
        partition = agree_on_partition(config, launch, layers=layers, dataset=dataset, device=device, found=found)
        steps_per_epoch = dataset.num_train // launch.train_batch_size
        _, main_steps = planned_steps(config, steps_per_epoch)
        engine = build_engine(
            config, launch, layers=layers, dataset=dataset, partition=partition, main_steps=main_steps
        )
        watch.progress(stage=engine.stage_id)
        report.show_stages(engine, partition=partition, place=place)
        trainer = Trainer(
            config,
            launch,
            engine=engine,
            dataset=dataset,
            partition=partition,
            folder=report.folder,
            display=report.display,
            watch=watch,
        )
        found = tell_all(found)
        if arguments.eval_only:
            is_evaluated = trainer.load(found)
            trainer.evaluate(reestimate=not is_evaluated)
            return
        if found is not None:
            trainer.resume(found)
        trainer.fit()


if __name__ == "__main__":
    run_and_exit(main)
