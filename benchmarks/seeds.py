"""Train configurations over several seeds, each run a launch of its own, and keep one line of results for every run.

    python benchmarks/seeds.py --ds_config ds_configs/quickstart.json ds_configs/quickstart_1f1b.json --seeds 0 1 2

Lines go to benchmarks/results/; `benchmarks/report.py` makes the README's tables of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run all combinations one after the other; 1 if any failed."""
    arguments = parse_arguments()
    failed = 0
    # Seeds outside, configurations inside: a slow hour of the machine meets all contestants.
    for seed in arguments.seeds:
        for config in arguments.ds_config:
            overrides = [f"dsaux.run.seed={seed}", *arguments.set]
            row = run(config, num_processes=arguments.num_gpus, overrides=overrides, suite=arguments.suite)
            if row is None:
                failed += 1
                continue
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
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
    parser.add_argument("--suite", default="quickstart", help="name of the table that the lines belong to")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/seeds.jsonl", help="file to append to")
    return parser.parse_args()


def run(config: Path, *, num_processes: int, overrides: list[str], suite: str) -> dict[str, Any] | None:
    """Launch one training run as a user would; return its line of results, None if it failed."""
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
    with tempfile.TemporaryDirectory(prefix="dsaux-") as folder:
        run_dir = Path(folder) / "run"
        command = [launcher, "--num_gpus", str(num_processes), "train.py", "--ds_config", str(config.resolve())]
        for override in overrides:
            command += ["--set", override]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--run_dir", str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wall_s = time.perf_counter() - started
        if done.returncode != 0:
            print(
                f"{config.stem} {overrides} failed with exit code {done.returncode}:\n{done.stdout[-3000:]}",
                file=sys.stderr,
            )
            return None
        events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        environment = json.loads((run_dir / "environment.json").read_text())
        return {
            "suite": suite,
            "case": config.stem,
            "num_processes": num_processes,
            "overrides": overrides,
            "command_wall_s": round(wall_s, 1),
            "final": next(event for event in reversed(events) if event["event"] == "final"),
            "environment": {key: value for key, value in environment.items() if key not in ("command", "host")},
        }


if __name__ == "__main__":
    sys.exit(main())
