"""Measures a case: all who take part, in turns, on crews of their own; one line of results for each entry and M."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cases import Case, Entry
from contestants import CONTESTANTS
from crew import Crew, CrewError, Order, Team, Window
from forecast import Forecast, Outlook
from gauges import (
    HOLLOW_STEPS,
    HOLLOW_WARMUP,
    SPIN_STEPS,
    SPIN_WARMUP,
    Pace,
    hollow_entries,
    hollow_work,
    lock_step_entries,
)
from hosts import Cable

Row = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What is measured in one turn: an entry at one number of micro-batches."""

    entry: Entry
    micro_batches: int

    def __str__(self) -> str:
        threads = "" if self.entry.threads == 1 else f" on {self.entry.threads} cores"
        return f"{self.entry.contestant}{threads}, M={self.micro_batches}"


def measure_case(case: Case, *, cable: Cable | None, environment: Row, tell: Callable[[str], None]) -> Iterator[Row]:
    """Measure a case; who fails is left out with a line that says why.

    Args:
        case: what to measure.
        cable: between hosts of their own, for a case with links.
        environment: of this run, for the lines.
        tell: called with what is done, for a terminal.

    Yields:
        Lines of results, for each link those of all turns.
    """
    tell(f"{case.name}: timing layers for cuts and predictions")
    forecast = Forecast(case.make_work())
    turns = [Turn(entry, count) for entry in case.entries for count in entry.micro_batches]
    outlooks = {turn: forecast.outlook(turn.entry, turn.micro_batches) for turn in turns}
    bounds = {turn: outlook.bounds for turn, outlook in outlooks.items()}  # cut once, whatever the link
    for entry in hollow_entries(case):
        tell(f"{case.name}: {entry.contestant}'s own time, with layers that compute nothing")
        _measure_engine(case, entry, bounds, forecast)
    with contextlib.ExitStack() as stack:
        gauges = lock_step_entries(case)
        crews = {entry: stack.enter_context(Crew(_team(case, entry, cable))) for entry in case.entries}
        crews |= {gauge: stack.enter_context(Crew(_team(case, gauge, None))) for gauge in gauges}
        rounds = _Rounds(case, turns, [Turn(gauge, count) for gauge in gauges for count in gauge.micro_batches], bounds)
        for link in case.links_mbit or (None,):
            if cable is not None:
                cable.shape(link)
            blocks = rounds.measure(crews, tell=tell)
            for gauge in rounds.gauges:
                if gauge not in rounds.failed:
                    pace = Pace(gauge.entry.ranks, gauge.entry.threads, gauge.micro_batches)
                    forecast.learn_pace(pace, statistics.median(_step_s(blocks[gauge], rounds.steps(gauge))))
            for turn in turns:
                if turn in rounds.failed:
                    yield _failed_row(case, turn, link=link, error=rounds.failed[turn], environment=environment)
                    continue
                look = functools.partial(
                    forecast.outlook, turn.entry, turn.micro_batches, link_mbit=link, bounds=bounds[turn]
                )
                row = row_of(
                    case,
                    turn,
                    blocks[turn],
                    link_mbit=link,
                    outlook=look(gauged=True),
                    work=forecast,
                    environment=environment,
                )
                yield {**row, "predicted_once": look().as_row()}


class _Rounds:
    """Goes round: a block of each contestant, and of each gauge twice.

    Attributes:
        failed: who failed, and why.

    Args:
        case: what is measured.
        turns: of the contestants.
        gauges: of the gauges.
        bounds: where the network is cut, by turn.
    """

    def __init__(
        self, case: Case, turns: Sequence[Turn], gauges: Sequence[Turn], bounds: Mapping[Turn, tuple[int, ...]]
    ) -> None:
        self.case, self.turns, self.gauges, self._bounds = case, turns, gauges, bounds
        self._whole = (0, len(case.make_work().layers))
        self.failed: dict[Turn, str] = {}

    def steps(self, turn: Turn) -> int:
        """Measured steps of a block; a gauge has more blocks, and shorter ones."""
        return max(1, self.case.steps // 2) if turn in self.gauges else self.case.steps

    def measure(self, crews: Mapping[Entry, Crew], *, tell: Callable[[str], None]) -> dict[Turn, list[list[Window]]]:
        """The blocks of all turns, without the first of each, which builds and warms up."""
        blocks: dict[Turn, list[list[Window]]] = {turn: [] for turn in (*self.turns, *self.gauges)}
        for number in range(-1, self.case.blocks):
            tell(f"{self.case.name}: block {number + 1} of {self.case.blocks}")
            shift = max(number, 0) % len(self.turns)
            turns = [*self.turns[shift:], *self.turns[:shift]]
            half = len(turns) // 2
            for turn in (*turns[:half], *self.gauges, *turns[half:], *self.gauges):
                if turn in self.failed:
                    continue
                is_kept = self.case.keeps_intervals and number == self.case.blocks - 1
                steps = self.steps(turn) if number >= 0 else 1
                bounds = self._bounds.get(turn, self._whole)
                order = Order(turn.micro_batches, bounds, self.case.warmup, steps, is_kept)
                try:
                    windows = crews[turn.entry].block(order)
                except CrewError as error:
                    self.failed |= {other: str(error) for other in blocks if other.entry == turn.entry}
                    continue
                if number >= 0:
                    blocks[turn].append(windows)
        return blocks


def _measure_engine(case: Case, entry: Entry, bounds: Mapping[Turn, tuple[int, ...]], forecast: Forecast) -> None:
    """Tell the planner what an engine takes for layers that compute nothing; who fails is left out."""
    spin = forecast.spin_times(entry)
    warmup, steps = (HOLLOW_WARMUP, HOLLOW_STEPS) if spin is None else (SPIN_WARMUP, SPIN_STEPS)
    make_work = functools.partial(hollow_work, case.make_work, spin=spin)
    team = Team(entry.contestant, entry.ranks, make_work, entry.threads)
    with Crew(team) as crew, contextlib.suppress(CrewError):  # the contestant itself will say it
        for count in entry.micro_batches:
            cut = bounds[Turn(entry, count)]
            windows = crew.block(Order(count, cut, warmup, steps))
            (step_s,) = _step_s([windows], steps)
            cpu_s = max(window.cpu_s for window in windows) / steps
            forecast.learn_engine(entry, count, bounds=cut, step_s=step_s, cpu_s=cpu_s)


def _step_s(blocks: Sequence[Sequence[Window]], steps: int) -> list[float]:
    """Seconds of a step, the mean over ranks and steps, for each block."""
    return [statistics.mean(window.window_s for window in block) / steps for block in blocks]


def _team(case: Case, entry: Entry, cable: Cable | None) -> Team:
    if cable is None or entry.ranks == 1:
        return Team(entry.contestant, entry.ranks, case.make_work, entry.threads)
    return Team(
        entry.contestant,
        entry.ranks,
        case.make_work,
        entry.threads,
        namespaces=cable.namespaces,
        address=cable.address,
        interface=cable.interface,
    )


def row_of(
    case: Case,
    turn: Turn,
    blocks: Sequence[Sequence[Window]],
    *,
    link_mbit: float | None,
    outlook: Outlook,
    work: Forecast,
    environment: Row,
) -> Row:
    """One line of results.

    Args:
        case: what was measured.
        turn: who, with how many micro-batches.
        blocks: for each block the windows of all ranks, in rank order.
        link_mbit: rate of the cable; None where unshaped or absent.
        outlook: what the planner expected.
        work: the work and its measured times.
        environment: of this run.
    """
    entry, batch = turn.entry, work.work.global_batch
    step_s = _step_s(blocks, case.steps)
    speeds = [batch / seconds for seconds in step_s]
    by_rank = list(zip(*blocks, strict=True))
    busy = [statistics.median(_busy_share(window, entry, work) for window in windows) for windows in by_rank]
    # A loopback's counter has all ranks' bytes in every rank's window; so has that of a cable with two ends.
    net = statistics.median(block[0].interface_bytes for block in blocks) / case.steps
    contestant = CONTESTANTS[entry.contestant]
    return {
        "suite": case.suite,
        "case": case.name,
        "contestant": entry.contestant,
        "stages": entry.ranks if contestant.chunks else 1,
        "ranks": entry.ranks,
        "threads": entry.threads,
        "micro_batches": turn.micro_batches,
        "global_batch": batch,
        "link_mbit": link_mbit,
        "samples_per_s": _figure(statistics.median(speeds)),
        "spread": [_figure(min(speeds)), _figure(max(speeds))],
        "step_s": _figure(statistics.median(step_s)),
        "idle_share": round(1.0 - statistics.mean(busy), 4),
        "busy_per_rank": [round(share, 4) for share in busy],
        "bytes_per_step": round(net),
        "peak_memory_bytes": max(round(statistics.median(w.peak_memory_bytes for w in windows)) for windows in by_rank),
        "terms_s": [_terms(windows, case.steps) for windows in by_rank],
        "loss": _last_loss(blocks),
        "n": len(blocks),
        "steps": case.steps,
        "warmup": case.warmup,
        "bounds": list(outlook.bounds),
        "predicted": outlook.as_row(),
        **({"intervals": [window.intervals for window in blocks[-1]]} if case.keeps_intervals else {}),
        "failed": None,
        "environment": environment,
    }


def _failed_row(case: Case, turn: Turn, *, link: float | None, error: str, environment: Row) -> Row:
    return {
        "suite": case.suite,
        "case": case.name,
        "contestant": turn.entry.contestant,
        "ranks": turn.entry.ranks,
        "threads": turn.entry.threads,
        "micro_batches": turn.micro_batches,
        "link_mbit": link,
        "failed": error.strip().splitlines()[-1],
        "environment": environment,
    }


def _busy_share(window: Window, entry: Entry, work: Forecast) -> float:
    """Share of the window in which a rank slept in its layers or, without such, used its cores."""
    if work.work.sleeper is not None:
        return window.slept_s / window.window_s
    return min(1.0, window.cpu_s / (window.window_s * entry.threads))


def _terms(windows: Sequence[Window], steps: int) -> dict[str, float]:
    names = windows[0].terms_s
    return {name: _figure(statistics.median(window.terms_s[name] for window in windows) / steps) for name in names}


def _last_loss(blocks: Sequence[Sequence[Window]]) -> float | None:
    losses = [window.loss for window in blocks[-1] if window.loss is not None]
    return _figure(statistics.mean(losses)) if losses else None


def _figure(value: float) -> float:
    return float(f"{value:.5g}")
