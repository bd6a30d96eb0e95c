"""Trains with mutated configurations, or goes on from damaged checkpoints, and fails if one ends as none should.

python -m tests.fuzz --configs 1000
python -m tests.fuzz --checkpoints 200
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fuzz.checkpoint_runs import Base, try_damage
from tests.fuzz.configs import make_mutant
from tests.fuzz.runs import Outcome, run
from tests.fuzz.verdict import Verdict, judge

Trial = tuple[Sequence[str], Outcome, Verdict]


def main() -> int:
    """Runs them one after the other, prints the counts and the defects; 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", type=int, default=0, help="number of mutated configurations")
    parser.add_argument("--checkpoints", type=int, default=0, help="number of damaged run folders")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutants")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--verbose", action="store_true", help="print the end of every run")
    arguments = parser.parse_args()
    if not arguments.configs and not arguments.checkpoints:
        parser.error("give --configs or --checkpoints, and a number")
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # before the server of the runs starts
    seed, first = arguments.seed, arguments.first
    defects = 0
    with tempfile.TemporaryDirectory(prefix="dsaux-fuzz-") as folder:
        scratch = Path(folder)
        if arguments.configs:
            numbers = range(first, first + arguments.configs)
            what = f"{arguments.configs} configurations of seed {seed}"
            defects += try_all(numbers, lambda n: try_config(scratch, seed, n), what=what, verbose=arguments.verbose)
        if arguments.checkpoints:
            base = Base.train(scratch / "base")
            numbers = range(first, first + arguments.checkpoints)
            what = f"{arguments.checkpoints} damaged run folders of seed {seed}"
            defects += try_all(
                numbers, lambda n: try_checkpoint(base, scratch, seed, n), what=what, verbose=arguments.verbose
            )
    return 1 if defects else 0


def try_config(scratch: Path, seed: int, number: int) -> Trial:
    """Trains with one mutated configuration."""
    mutant = make_mutant(seed, number)
    outcome = run(mutant, scratch / str(number))
    return mutant.changes, outcome, judge(mutant, outcome)


def try_checkpoint(base: Base, scratch: Path, seed: int, number: int) -> Trial:
    """Goes on from one damaged run folder."""
    done, outcome, verdict = try_damage(base, scratch / f"damaged{number}", seed=seed, number=number)
    return done.changes, outcome, verdict


def try_all(numbers: range, attempt: Callable[[int], Trial], *, what: str, verbose: bool) -> int:
    """Makes all trials and prints counts and defects.

    Args:
        numbers: of the trials.
        attempt: makes one.
        what: names them.
        verbose: print the end of every one.

    Returns:
        How many defects there were.
    """
    counts: Counter[str] = Counter()
    started = time.monotonic()
    for number in numbers:
        changes, outcome, verdict = attempt(number)
        counts[verdict.kind] += 1
        if verdict.is_defect or verbose:
            print(f"{number}: {verdict.kind} ({verdict.reason}), {outcome.seconds:.1f} s, exit {outcome.code}")
            print(*(f"    {change}" for change in changes), sep="\n")
        if verdict.is_defect:
            print(*(f"    | {line[:300]}" for line in outcome.stderr.splitlines()[-30:]), sep="\n")
        sys.stdout.flush()
    print(f"{what} in {time.monotonic() - started:.0f} s:")
    for kind, count in counts.most_common():
        print(f"  {kind:15} {count:5}")
    return counts["DEFECT"]


if __name__ == "__main__":
    sys.exit(main())
