"""Train configurations over several seeds, each run a launch of its own, and keep one line of results for every run.

    python benchmarks/seeds.py --ds_config ds_configs/quickstart.json ds_configs/quickstart_1f1b.json --seeds 0 1 2

Lines go to benchmarks/results/; `benchmarks/report.py` makes the README's tables of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dsaux.config import ConfigError, load_config
from dsaux.rendezvous import free_port

ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, Any]


def main() -> int:
    """Run all combinations one after the other; 1 if any failed, 2 for a configuration that none can have."""
    arguments = parse_arguments()
    try:
        for seed, config in itertools.product(arguments.seeds, arguments.ds_config):
            load_config(config, overrides=[f"dsaux.run.seed={seed}", *arguments.set])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = 0
    # Seeds outside, configurations inside: a slow hour of the machine meets all contestants.
    for seed in arguments.seeds:
        for config in arguments.ds_config:
            overrides = [f"dsaux.run.seed={seed}", *arguments.set]
            row = run(config, num_processes=arguments.num_gpus, overrides=overrides, suite=arguments.suite)
            if row["failed"]:
                failed += 1
                continue
            append_line(arguments.out, {**row, "machine_was_busy": arguments.busy})
            final = row["final"]
            print(
                f"{row['case']}, seed {seed}: test accuracy {final['test_accuracy']:.4f}, "
                f"{final['train_samples_per_s']:.0f} samples/s, {row['command_wall_s']:.0f} s",
                flush=True,
            )
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ds_config", nargs="+", required=True, type=Path, metavar="FILE", help="configurations to train"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="values of dsaux.run.seed (0 1 2)")
    parser.add_argument("--num_gpus", type=int, default=2, help="processes to start (2)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="further overrides, as for train.py"
    )
    parser.add_argument("--busy", action="store_true", help="other work runs beside: keep the times out of the tables")
    parser.add_argument("--suite", default="quickstart", help="name of the table that the lines belong to")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/seeds.jsonl", help="file to append to")
    return parser.parse_args()


def run(config: Path, *, num_processes: int, overrides: list[str], suite: str) -> Row:
    """Launch one training run as a user would.

    Args:
        config: the configuration.
        num_processes: processes to start.
        overrides: "KEY=VALUE" each, for `--set`.
        suite: name of the table that the line belongs to.

    Returns:
        Its line of results. Where the run failed "failed" is true, "final" None and "error" the error's last line.
    """
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
    with tempfile.TemporaryDirectory(prefix="dsaux-") as folder:
        run_dir = Path(folder) / "run"
        # A port of its own: two studies may run side by side.
        command = [launcher, "--num_gpus", str(num_processes), "--master_port", str(free_port()), "train.py"]
        command += ["--ds_config", str(config.resolve())]
        for override in overrides:
            command += ["--set", override]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--run_dir", str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wall_s = time.perf_counter() - started
        failed = done.returncode != 0
        if failed:
            print(
                f"{config.stem} {overrides} failed with exit code {done.returncode}:\n{done.stdout[-3000:]}",
                file=sys.stderr,
            )
        events = read_lines(run_dir / "metrics.jsonl")
        environment = {} if failed else json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
        return {
            "suite": suite,
            "case": config.stem,
            "num_processes": num_processes,
            "overrides": overrides,
            "command_wall_s": round(wall_s, 1),
            "failed": failed,
            "exit_code": done.returncode,
            "error": last_error(done.stdout) if failed else None,
            "evals": [[event["epoch"], event["top1"]] for event in events if event["event"] == "eval"],
            "eval_s": [round(seconds, 3) for seconds in training_seconds(events)],
            "final": None if failed else next(event for event in reversed(events) if event["event"] == "final"),
            "environment": {key: value for key, value in environment.items() if key not in ("command", "host")},
        }


def training_seconds(events: list[Row]) -> list[float]:
    """Seconds from the start of the training to each evaluation, without the evaluations themselves."""
    seconds, started, spent = [], 0.0, 0.0
    for event in events:
        if event["event"] == "stages":
            started = event["time_s"]
        if event["event"] == "eval":
            spent += event["seconds"]
            seconds.append(event["time_s"] - started - spent)
    return seconds


def changes_of(row: Row) -> list[str]:
    """The keys that a run was given on its command line, KEY=VALUE, but seed and length, which the table has."""
    changes = [change.removeprefix("dsaux.") for change in row["overrides"]]
    shown_elsewhere = ("run.seed=", "run.epochs=", "run.exact_epochs=", "pipeline.schedule=")
    return [change for change in changes if not change.startswith(shown_elsewhere)]


def last_error(output: str) -> str:
    """The last line in which a rank says its error, without the rank; else the last line that is not empty."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.partition("] error: ")[2] for line in lines if line.startswith("[rank ") and "] error: " in line]
    return (errors or lines or ["no output"])[-1]


def read_lines(path: Path) -> list[Row]:
    """The JSON objects of a file, one a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_line(path: Path, row: Row) -> None:
    """Add one line of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
