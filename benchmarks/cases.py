"""What each suite measures: cases, who takes part, at which numbers of micro-batches, for how long."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from contestants import CONTESTANTS
from work import Work, model_work, sleeping_work

EXACT = ("deepspeed-1f1b", "deepspeed-dualpipev", "torch-1f1b", "torch-interleaved", "torch-zbv")
"""Pipelines with exact back-propagation."""
DSAUX = ("dsaux-penalty", "dsaux-al", "dsaux-local")


@dataclass(frozen=True)
class Entry:
    """A contestant of a case.

    Attributes:
        contestant: a name in `CONTESTANTS`.
        ranks: processes.
        micro_batches: numbers of micro-batches to measure it at.
        threads: of each process; more than one: not pinned to a core.
    """

    contestant: str
    ranks: int
    micro_batches: tuple[int, ...]
    threads: int = 1


@dataclass(frozen=True)
class Case:
    """One comparison: the same network, weights, batches and optimizer for all who take part.

    Attributes:
        suite: name of the suite.
        name: unique in the suite.
        entries: who takes part.
        make_work: makes the work, in every process.
        warmup: unmeasured steps of a block, the fill of a wavefront not counted.
        steps: measured steps of a block.
        blocks: measured blocks of each entry and number of micro-batches, in turns.
        links_mbit: for ranks on hosts of their own: what the cable between them lets through, one after the other; None
            is unshaped. Empty for ranks on one host.
        keeps_intervals: whether the lines hold when each layer slept, for a chart.
    """

    suite: str
    name: str
    entries: tuple[Entry, ...]
    make_work: Callable[[], Work]
    warmup: int = 1
    steps: int = 5
    blocks: int = 4
    links_mbit: tuple[float | None, ...] = ()
    keeps_intervals: bool = False


def cases_of(suite: str, *, quick: bool, cores: int) -> list[Case]:
    """The cases of a suite that is measured with crews.

    Args:
        suite: "sleep", "compute" or "network".
        quick: the smallest case alone, in a few minutes: shows that everything runs, its figures are worth little.
        cores: of this machine, for the process that may use all of them.
    """
    cases = {"sleep": _sleep, "compute": _compute, "network": _network}[suite](cores)
    if not quick:
        return cases
    first = cases[0]
    entries = tuple(replace(entry, micro_batches=entry.micro_batches[:2]) for entry in first.entries)
    links = first.links_mbit and (first.links_mbit[0], first.links_mbit[-1])
    return [replace(first, entries=entries, steps=2, blocks=2, links_mbit=links)]


def _allowed(contestant: str, ranks: int, counts: Sequence[int]) -> tuple[int, ...]:
    """The numbers of micro-batches that a contestant can have."""
    least = CONTESTANTS[contestant].least_micro_batches(ranks)
    return tuple(count for count in counts if count >= least)


def _pipelines(names: Sequence[str], ranks: int, counts: Sequence[int]) -> tuple[Entry, ...]:
    entries = (Entry(name, ranks, _allowed(name, ranks, counts)) for name in names)
    return tuple(entry for entry in entries if entry.micro_batches)


def _sleep(cores: int) -> list[Case]:
    """Stages that sleep: what the schedule itself costs, without the machine. The sleep of a step grows with M.

    A stage sleeps so long that the engines' own work does not decide, which eight processes share two cores for.
    """
    cases = []
    for stages in (2, 4, 8):
        for count in (1, 4, 8, 16, 32):
            forward_s = (0.05 if count == 1 else 0.01 * count) * stages
            counts = (1,) if count == 1 else (1, count)
            work = functools.partial(
                sleeping_work, stages=stages, global_batch=4 * count, forward_s=forward_s, backward_s=2 * forward_s
            )
            entries = (*_pipelines(EXACT, stages, (count,)), *_pipelines(DSAUX, stages, counts))
            name, has_chart = f"p={stages}, M={count}", stages == 4 and count == 8
            # Of the longest cases fewer steps; they scatter least.
            steps, blocks = (4, 5) if count == 1 else (2, 4) if stages == 8 and count >= 16 else (3, 4)
            cases.append(Case("sleep", name, entries, work, steps=steps, blocks=blocks, keeps_intervals=has_chart))
    return cases


def _compute(cores: int) -> list[Case]:
    """Real networks on this machine's cores; two stages fit two cores, four are oversubscribed.

    The last case is one stage under dsaux's engine beside a plain loop: what the engine itself costs.
    """
    cases = []
    for model, batch, ranks in (
        ("resnet56", 64, 2),
        ("resnet56", 128, 2),
        ("resnet20", 128, 2),
        ("resnet110", 128, 2),
        ("wrn16_4", 64, 2),
        ("resnet56", 128, 4),
    ):
        counts = tuple(count for count in (1, 2, 4, 8, 16) if batch // count >= 4)
        work = functools.partial(model_work, model, image_size=32, global_batch=batch)
        entries = (
            Entry("one-process", 1, (1, 4)),
            Entry("one-process", 1, (1, 4), threads=cores),
            Entry("ddp", ranks, (1, 2, 4)),
            *_pipelines(EXACT, ranks, counts),
            *_pipelines(DSAUX, ranks, (1, 2, 4, 8)),
        )
        is_slow = model in ("resnet110", "wrn16_4")
        name = f"{model}, batch {batch}, K={ranks}"
        cases.append(Case("compute", name, entries, work, steps=2 if is_slow else 5, blocks=4))
    alone = functools.partial(model_work, "resnet20", image_size=32, global_batch=128)
    entries = (Entry("one-process", 1, (1,)), Entry("dsaux-penalty", 1, (1,)))
    cases.append(Case("compute", "resnet20, batch 128, K=1", entries, alone, steps=5, blocks=8))
    return cases


def _network(cores: int) -> list[Case]:
    """Two hosts with one rank each and a cable between them that lets through a set rate; a thin AuxNet."""
    work = functools.partial(model_work, "wrn16_4", image_size=32, global_batch=32, aux_width=0.25)
    entries = (
        Entry("ddp", 2, (1,)),
        *_pipelines(("deepspeed-1f1b", "torch-1f1b", "torch-zbv"), 2, (1, 2, 4)),
        *_pipelines(DSAUX, 2, (1,)),
    )
    name = "wrn16_4, batch 32, K=2, AuxNet width 0.25"
    return [Case("network", name, entries, work, steps=3, blocks=4, links_mbit=(None, 1000.0, 200.0, 50.0))]
