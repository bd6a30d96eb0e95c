"""Reads the profile in a run folder and prints it: `python -m dsaux.profile` (`dsaux.profile`) calls `main`.

A row is a rank, a column a term of Eq. 27. `dsaux.profile_files` says what is in the files.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.text import Text

from dsaux.command import Parser, console, show_summary
from dsaux.display_text import Column, count, plain_table, rich_table
from dsaux.profile import OTHER
from dsaux.profile_files import PROFILE_FOLDER, RankProfile, read_profile

_NAMES = {
    "data": "data",
    "aux_forward": "AuxNet forward",
    "aux_backward": "AuxNet backward",
    "aux_update": "AuxNet update",
    "stage": "stage's passes",
    "transfer": "transfer",
    OTHER: "other",
}
_DECOUPLED = ("penalty", "al")
"""Schedules that Eq. 27 is of."""


@dataclass(frozen=True)
class Speedup:
    """What Eq. 27 makes of the terms; all times in seconds of a step.

    Attributes:
        data: T_d, mean over the ranks.
        aux_forward: t_f, mean over the ranks.
        aux_backward: t_b, likewise.
        aux_update: t_psi, likewise; holds the wait for the sum of the AuxNet's gradients.
        network: T_f + T_b, the sum of the stages' terms, each the mean over its replicas.
        by_terms: the speed-up over one device by Eq. 27, without transfers and other time.
        by_step: (T_d + T_f + T_b) over the longest step of a rank, with them.
    """

    data: float
    aux_forward: float
    aux_backward: float
    aux_update: float
    network: float
    by_terms: float
    by_step: float


def eq27(profiles: Sequence[RankProfile]) -> Speedup | None:
    """The speed-up over one device that Eq. 27 gives; None for a schedule without an AuxNet.

    Args:
        profiles: of all ranks.
    """
    if profiles[0].schedule not in _DECOUPLED:
        return None
    data, forward, backward, update = (
        fmean(its.terms[name] for its in profiles) for name in ("data", "aux_forward", "aux_backward", "aux_update")
    )
    stages = profiles[0].stages
    network = sum(fmean(its.terms["stage"] for its in profiles if its.stage == stage) for stage in range(stages))
    alone = data + network
    step = max(its.seconds_per_step for its in profiles)
    together = data + update + forward + backward + network / stages
    return Speedup(
        data=data,
        aux_forward=forward,
        aux_backward=backward,
        aux_update=update,
        network=network,
        by_terms=alone / together if together > 0 else math.nan,
        by_step=alone / step if step > 0 else math.nan,
    )


def show_profile(run: Path, profiles: Sequence[RankProfile]) -> None:
    """Print the table, the speed-up, and where the traces are."""
    out, first = console(), profiles[0]
    title = (
        f"{run}: {first.schedule}, {count(first.stages, 'stage')} x {count(first.replicas, 'replica')}, "
        f"{first.micro_batches} micro-batch{'es' * (first.micro_batches != 1)} in a step"
    )
    out.print(Text(title, style="bold"), soft_wrap=True)
    steps = count(len(first.timed_steps), "step")
    out.print(Text(f"ms of a step, mean of {steps}, and share of it", style="dim"), soft_wrap=True)
    columns = [Column("rank"), Column("stage"), *(Column(name) for name in _NAMES.values()), Column("sum")]
    rows = [_row(its) for its in profiles]
    if out.is_terminal:
        out.print(rich_table(columns, rows))
    else:
        for line in plain_table(columns, rows):
            out.print(Text(f"  {line}"), soft_wrap=True)
    show_summary(out, "what this says", _summary(run, profiles))


def to_json(run: Path, profiles: Sequence[RankProfile]) -> dict[str, Any]:
    """The same for programs."""
    speedup = eq27(profiles)
    return {
        "run": str(run),
        "ranks": [asdict(its) for its in profiles],
        "eq27": None if speedup is None else {key: _finite(value) for key, value in asdict(speedup).items()},
        "traces": {str(its.rank): str(path) for its in profiles if (path := _trace(run, its)) is not None},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: if the command line is wrong, or there is no whole profile.
    """
    arguments = _parse(argv)
    profiles = read_profile(arguments.run)
    if arguments.json:
        print(json.dumps(to_json(arguments.run, profiles)))
    else:
        show_profile(arguments.run, profiles)
    return 0


# ---- parts ----------------------------------------------------------------------------------------------------------


def _row(its: RankProfile) -> list[str]:
    total = sum(its.terms.values())
    cells = [f"{1e3 * its.terms[name]:.2f} ({_percent(its.terms[name], total)})" for name in _NAMES]
    return [str(its.rank), str(its.stage), *cells, f"{1e3 * total:.2f}"]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "-"


def _summary(run: Path, profiles: Sequence[RankProfile]) -> list[tuple[str, Text | str]]:
    first, speedup = profiles[0], eq27(profiles)
    rows: list[tuple[str, Text | str]] = []
    if speedup is None:
        rows.append(("Eq. 27", f"not of schedule {first.schedule}: it is about stages behind an AuxNet (penalty, al)"))
    else:
        text = (
            f"{speedup.by_terms:.2f} times one device, by the means of data and AuxNet over the ranks and with T_f + "
            f"T_b = {1e3 * speedup.network:.2f} ms, the sum of the stages' passes: an estimate, no device alone was "
            "timed; transfers and other time are not in it"
        )
        rows.append(("Eq. 27", text))
        rows.append(
            ("measured step", f"the same over the longest step, transfers, waits and all: {speedup.by_step:.2f} times")
        )
    rows.append(("times", f"{_clock(first.device)}; waits for other ranks are in transfer and AuxNet update"))
    rows.append(("machine", _machine(first)))
    traces = [path for its in profiles if (path := _trace(run, its)) is not None]
    if traces:
        names = ", ".join(path.name for path in traces)
        steps = count(len(first.traced_steps), "step")
        rows.append(("traces", f"{traces[0].parent}: {names} ({steps}); open at ui.perfetto.dev or chrome://tracing"))
    else:
        rows.append(("traces", "none: the training ended before a step was traced, or the files were removed"))
    return rows


def _machine(its: RankProfile) -> str:
    about = its.environment
    gpus = about.get("gpus") if its.device.startswith("cuda") else None
    names = Counter(map(str, gpus)) if isinstance(gpus, list) else {}
    devices = [f"{number} x {name}" for name, number in names.items()]
    return ", ".join([*devices, str(about.get("cpu")), f"{about.get('cores')} cores"])


def _clock(device: str) -> str:
    return "of the GPU's stream, between events" if device.startswith("cuda") else "by the wall clock"


def _trace(run: Path, its: RankProfile) -> Path | None:
    if its.trace is None:
        return None
    path = run / PROFILE_FOLDER / its.trace
    return path if path.is_file() else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    import dsaux.profile

    parser = Parser(
        prog="python -m dsaux.profile",
        description=dsaux.profile.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run that was profiled")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)
