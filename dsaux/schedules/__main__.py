"""Draws and checks schedules; needs no GPU and starts no process group.

python -m dsaux.schedules --schedule al --stages 4 --steps 6
python -m dsaux.schedules --schedule al-overlap --stages 4 --micro_batches 8 --check
python -m dsaux.schedules --schedule local --stages 4 --steps 6
python -m dsaux.schedules --schedule 1f1b --stages 4 --format trace --out trace.json
python -m dsaux.schedules --compare --format svg --out docs/figures/schedules.svg
python -m dsaux.schedules --compare --schedule penalty
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NoReturn

from dsaux.schedules import RUNS
from dsaux.schedules.check import ScheduleError, check_named
from dsaux.schedules.draw import chrome_trace, comparison_svg, comparison_text, svg, text_grid
from dsaux.schedules.timeline import Timeline, simulate

_DRAWINGS = {"text": text_grid, "svg": svg, "trace": chrome_trace}
_COMPARISONS = {"text": comparison_text, "svg": comparison_svg}
_EXACT = "1f1b"
_STEPS = 2


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 for a faulty schedule and 2 for wrong arguments."""
    args = _parse(argv)
    try:
        if args.check:
            report = check_named(args.schedule, args.micro_batches, args.stages, num_batches=args.steps)
            print(f"{args.schedule}: {report}")
            return 0
        drawing = _compare(args) if args.compare else _draw(args)
    except ScheduleError as error:
        print(f"{args.schedule}: {error}", file=sys.stderr)
        return 1
    if args.out is None:
        print(drawing.rstrip("\n"))
        return 0
    try:
        args.out.write_text(drawing if drawing.endswith("\n") else f"{drawing}\n", encoding="utf-8")
    except OSError as error:
        print(f"error: --out {args.out} can't be written: {error.strerror}. Give another path.", file=sys.stderr)
        return 2
    return 0


def _draw(args: argparse.Namespace) -> str:
    timeline = simulate(
        args.schedule,
        num_stages=args.stages,
        micro_batches=args.micro_batches,
        num_batches=args.steps or _STEPS,
        aux_share=args.aux_share,
    )
    return _DRAWINGS[args.format](timeline)


def _compare(args: argparse.Namespace) -> str:
    """Draw 1F1B above, and below it enough batches that all stages still have one where the axis ends."""

    def below(num_batches: int) -> Timeline:
        return simulate(
            args.schedule, num_stages=args.stages, micro_batches=1, num_batches=num_batches, aux_share=args.aux_share
        )

    two, shape = below(2), {"num_stages": args.stages, "micro_batches": args.micro_batches}
    # By default a wavefront is shown filled for as long as it takes to fill.
    fill = (two.num_ticks - two.num_batches) * two.period
    steps = args.steps or max(_STEPS, math.ceil(2 * fill / simulate(_EXACT, num_batches=1, **shape).end))
    above = simulate(_EXACT, num_batches=steps, **shape)
    return _COMPARISONS[args.format](above, below(max(2, math.ceil(above.end / two.period))))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        mend = "" if message.endswith(".") else f". Run {self.prog} --help."  # argparse's own name none
        self.exit(2, f"error: {message}{mend}\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m dsaux.schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--schedule", choices=sorted(RUNS), help="schedule to draw, check or compare")
    parser.add_argument("--stages", type=int, default=4, help="number of stages (default 4)")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"batches (default: to draw {_STEPS}, to check one more than stages, to compare what shows the fill)",
    )
    parser.add_argument(
        "--micro_batches",
        type=int,
        help="micro-batches in a batch (default: 1f1b as many as stages, dsaux 1); in a comparison those of 1f1b",
    )
    parser.add_argument(
        "--aux_share",
        type=float,
        default=0.1,
        help="time of the AuxNet as a share of a stage's (default 0.1)",
    )
    parser.add_argument("--format", choices=sorted(_DRAWINGS), default="text", help="what to write")
    parser.add_argument("--out", type=Path, help="file to write; default: the screen")
    parser.add_argument("--compare", action="store_true", help="1f1b and a schedule (default al) on one time axis")
    parser.add_argument("--check", action="store_true", help="replay all ranks and look for faults")
    args = parser.parse_args(argv)
    for name in ("stages", "steps", "micro_batches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be a whole number >= 1. Change it.")
    if not 0 <= args.aux_share <= 1:
        parser.error(f"--aux_share is {args.aux_share:g}; it must be a number >= 0 and <= 1. Change it.")
    if not args.compare and args.schedule is None:
        parser.error(f"--schedule is missing. Give --schedule NAME, one of {', '.join(sorted(RUNS))}, or --compare.")
    if args.compare and args.schedule == _EXACT:
        parser.error(
            f"--compare draws {_EXACT} above another schedule; give --schedule al, al-overlap, local or penalty."
        )
    if args.compare and (args.check or args.format not in _COMPARISONS):
        parser.error("--compare draws text or svg; for --check and --format trace leave it out.")
    if args.micro_batches is None:
        args.micro_batches = args.stages if args.compare or args.schedule == _EXACT else 1
    args.schedule = args.schedule or "al"
    return args


if __name__ == "__main__":
    sys.exit(main())
