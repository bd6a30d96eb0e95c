"""Who is to blame when a run fails: what ranks say of themselves, what follows from it. Used by `dsaux.watch`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsaux.runtime import EXIT_FAILED

SHORT_SILENCE_S = 4.0
"""How long a rank may be silent where a broken connection has already said that somebody is gone."""

STORE_LEAD_S = 2.0
"""Rank 0, which keeps the store, stays until the others know why the run ends. Where it went at about the time of
others, it was the first, and they left because of it. Signs are up to two seconds old."""

_LONGEST_TEXT = 600
_CONNECTION = re.compile(r"gloo|nccl|connection|broken pipe|socket|pair closure|timed? ?out", re.IGNORECASE)
_TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory", re.IGNORECASE)


class RunFailedError(RuntimeError):
    """Why this run has failed: the text names rank, host, stage, step and cause.

    `__cause__` is this rank's own error; None where another rank is to blame.
    """


class DivergedError(RuntimeError):
    """A loss, or too many of them in a row, is no finite number: the training's own doing, so the text says it all."""


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself every second.

    Attributes:
        machine: kernel and process namespace, in which `pid` means something; empty if unknown.
        stage: stage k; None until it is known.
        step: number of the optimizer step under way, from 1; 0 before the first.
        place: line of code at which the main thread stands.
        waits: whether it waits for other ranks there.
        moves: grows while the main thread does something.
        beat: number of this sign.
        is_done: the rank has ended as it should.
    """

    rank: int
    host: str
    machine: str = ""
    pid: int = 0
    stage: int | None = None
    step: int = 0
    activity: str = "start"
    place: str = ""
    waits: bool = False
    moves: int = 0
    beat: int = 0
    is_done: bool = False

    def __str__(self) -> str:
        stage = "" if self.stage is None else f"stage {self.stage}, "
        return f"rank {self.rank} (host {self.host}, {stage}step {self.step}, {self.activity})"


@dataclass
class Seen:
    """The last sign of a rank, and when its beat and its moves last changed, in seconds of this process's clock."""

    sign: Sign
    heard_at: float
    moved_at: float

    def update(self, sign: Sign, *, now: float) -> None:
        """Take the present sign; not one of a process that has come to the wrong run, such as by its port."""
        if (sign.machine, sign.pid) != (self.sign.machine, self.sign.pid):
            return
        self.heard_at = now if sign.beat != self.sign.beat else self.heard_at
        self.moved_at = now if sign.moves != self.sign.moves else self.moved_at
        self.sign = sign


@dataclass(frozen=True)
class Cause:
    """Why a run ends: a text that names the ranks to blame, these ranks, and the exit code of all others."""

    text: str
    ranks: tuple[int, ...] = ()
    exit_code: int = EXIT_FAILED


# ---- who is to blame ------------------------------------------------------------------------------------------------


def describe(error: BaseException) -> str:
    """An error in one line, with the mend where memory ran out."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text, kind = " ".join(str(error).split())[:_LONGEST_TEXT], type(error).__name__
    if isinstance(error, DivergedError):
        return text
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _MEMORY.search(text):
        mend = "Lower train_batch_size, or set pipeline.activation_checkpoint_interval to 1."
        return f"out of memory: {text.rstrip('.')}. {mend}" if text else f"out of memory. {mend}"
    return f"{kind}: {text}" if text else kind


def headline(error: BaseException) -> str:
    """Kind and first line of an error, for one whose whole text fills pages, as a compiler's."""
    first = str(error).strip().partition("\n")[0].strip()
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank did not answer: a broken connection or a timeout."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: PyTorch need not be imported
    if "DistError" in kinds or isinstance(error, ConnectionError):
        return not _MEMORY.search(str(error))
    return type(error) is RuntimeError and bool(_CONNECTION.search(str(error)))


def is_timeout(error: BaseException) -> bool:
    """Whether an error says that a rank did not answer in time."""
    return bool(_TIMEOUT.search(str(error)))


def find_gone(
    others: Iterable[Seen], *, now: float, silence_s: float, is_alive: Callable[[Sign], bool | None]
) -> Cause | None:
    """The rank whose process has ended without a word; of several the one that fell silent first, or rank 0.

    Args:
        others: the other ranks.
        now: present time of this process's clock.
        silence_s: how long a rank may be silent.
        is_alive: whether a rank's process exists; None if this process can't know.
    """

    def first(seen: Seen) -> float:
        return seen.heard_at - (STORE_LEAD_S if seen.sign.rank == 0 else 0.0)

    for seen in sorted(others, key=first):
        alive, silent_s = is_alive(seen.sign), now - seen.heard_at
        if seen.sign.is_done or alive:
            continue
        if alive is False:
            text = "is gone: its process was killed (out of memory? see dmesg) or crashed (see its own output)"
        elif silent_s > silence_s:
            text = (
                f"gave no sign of life for {silent_s:.0f} s: it was killed (out of memory? see dmesg there) or crashed,"
                " or its host is gone"
            )
        else:
            continue
        return Cause(f"{seen.sign} {text}", (seen.sign.rank,))
    return None


def find_stalled(ranks: Sequence[Seen], *, now: float, stall_s: float, missing: Sequence[int]) -> Cause | None:
    """The rank to blame if none at all has moved for `stall_s`; None while one moves.

    Args:
        ranks: all ranks that have been seen, this one included.
        now: present time of this process's clock.
        stall_s: how long all ranks may stand still.
        missing: ranks that have not been seen yet.
    """
    running = [seen for seen in ranks if not seen.sign.is_done]
    still_s = now - max((seen.moved_at for seen in running), default=now)
    if still_s <= stall_s:
        return None
    what = f"no rank has made progress for {still_s:.0f} s"
    if missing:
        return Cause(f"rank {', '.join(map(str, missing))} did not come: {what}")
    silent_s = max(SHORT_SILENCE_S, stall_s / 2)
    frozen = [seen.sign for seen in running if now - seen.heard_at > silent_s]  # stopped by a signal or a debugger
    blamed = behind(frozen or [seen.sign for seen in running])
    if len(blamed) == 1:
        return Cause(f"{blamed[0]} hangs at {blamed[0].place}: {what}", (blamed[0].rank,))
    places = ", ".join(f"{sign} is at {sign.place}" for sign in blamed[:4])
    return Cause(f"{what}: {places}", tuple(sign.rank for sign in blamed))


def behind(signs: Sequence[Sign]) -> list[Sign]:
    """The ranks that the others wait for: of those that do not wait themselves the ones in the lowest step."""
    candidates = [sign for sign in signs if not sign.waits] or list(signs)
    step = min((sign.step for sign in candidates), default=0)
    return [sign for sign in candidates if sign.step == step]
