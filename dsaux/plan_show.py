"""How a plan is shown to people. Used by `python -m dsaux.plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from dsaux.command import console, show_summary
from dsaux.config import Config
from dsaux.display_text import Column, memory, plain_table, throughput

if TYPE_CHECKING:  # takes seconds to import: what is wrong with the command line is said before
    from dsaux.plan import Plan
    from dsaux.planner import Prediction


def show_plan(plan: Plan, *, every: bool, out: Console | None = None) -> None:
    """Print a table, what it rests on, and the advice.

    Args:
        plan: what to show.
        every: every prediction, and not each contestant's best alone.
        out: where to write.
    """
    out = out or console()
    model, data = plan.config.dsaux.model.name, plan.config.dsaux.data.name
    title = f"{model} on {data}, global batch {plan.global_batch:,}, {plan.devices:,} device{'s' * (plan.devices != 1)}"
    out.print(Text(f"{title} (a prediction; nothing was trained)", style="bold"), soft_wrap=True)
    shown = plan.predictions if every else plan.best
    for line in plain_table(_COLUMNS, [_row(plan, its) for its in shown]):
        out.print(Text(f"  {line}"), soft_wrap=True)
    show_summary(out, "what this rests on", _summary(plan))
    out.print(Text(plan.advice.text, style="bold"), soft_wrap=True)


_COLUMNS = (
    Column("contestant", is_text=True),
    Column("stages"),
    Column("replicas"),
    Column("micro-batches"),
    Column("samples/s"),
    Column("% idle"),
    Column("AuxNet %"),
    Column("memory"),
    Column("sent/step"),
)


def _row(plan: Plan, its: Prediction) -> list[str]:
    return [
        its.contestant,
        str(its.stages),
        str(its.replicas),
        str(its.micro_batches),
        throughput(its.samples_per_s),
        f"{100 * its.idle_share:.1f}",
        "-" if its.is_exact else f"{100 * its.aux_share:.1f}",
        memory(its.memory_bytes) if plan.fits(its) else f"{memory(its.memory_bytes)} (too much)",
        size_words(its.bytes_per_step),
    ]


def _summary(plan: Plan) -> list[tuple[str, Text | str]]:
    scaled = f"; micro-batches of more than {plan.timed_up_to} samples scaled from that" if plan.timed_up_to else ""
    rows: list[tuple[str, Text | str]] = [
        ("times", f"measured on {plan.device}, in float32{scaled}{_not_counted(plan.config)}"),
        (
            "link",
            f"{size_words(plan.link.bytes_per_s)}/s each way between neighbours, {1e6 * plan.link.latency_s:g} us a "
            "message: assumed, not measured (--link, --latency_us)",
        ),
    ]
    cut = [
        its for its in plan.best if its.stages > 1 and its.contestant in ("dsaux-al", "dsaux-penalty", "deepspeed-1f1b")
    ]
    for its in cut:
        names = [plan.layer_names[bound] for bound in its.bounds[1:-1]]
        rows.append((f"cut of {its.contestant}", f"{json.dumps(names)} (dsaux.pipeline.partition)"))
    if plan.break_even is not None:
        ours = next((its for its in plan.best if its.contestant == "dsaux-al"), None)
        is_now = f"; it takes {100 * ours.aux_share:.1f} % here" if ours is not None else ""
        if plan.break_even > 0:
            words = "dsaux-al is faster than the best exact way while the AuxNet takes less than "
            words += f"{100 * plan.break_even:.1f} % of a stage's time{is_now}"
        else:
            words = f"dsaux-al would not be faster than the best exact way with an AuxNet of no cost{is_now}"
        rows.append(("break-even", words))
    return rows


def _not_counted(config: Config) -> str:
    """What a configuration asks for and the prediction leaves out."""
    blocks = {"bf16": config.deepspeed.get("bf16", {}).get("enabled")}
    blocks["ZeRO"] = config.deepspeed.get("zero_optimization", {}).get("stage")
    blocks["activation checkpoints"] = config.deepspeed.get("pipeline", {}).get("activation_checkpoint_interval")
    names = [name for name, value in blocks.items() if value]
    return f"; without the configuration's {' and '.join(names)}" if names else ""


def size_words(size: float) -> str:
    """A size as links count it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
