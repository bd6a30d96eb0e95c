"""Which batch every stage treats in a tick, and where its data come from. Used by the engine.

A call of `train_batch` lets one batch enter. Under `al` it enters at the last stage, and stage k treats it K-1-k ticks
later (a lag of one tick from stage to stage), so it reads its data later too. Three stages, four calls, a drain:

    call      0     1     2     3     drain
    stage 0   .     .     0     1     2     3
    stage 1   .     0     1     2     3     .
    stage 2   0     1     2     3     .     .

Under `local` the lag is -1: a batch enters at the first stage, and the drawing stands on its head, stage 2 in the place
of stage 0. Under `penalty` the lag is zero: all stages treat the batch that enters, and nothing is ever under way
between calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsaux.schedules.lagrangian import wavefront_batch


@dataclass(frozen=True)
class Tick:
    """What the stages do in one tick.

    Attributes:
        steps: for each stage the optimizer step, from 0 at the start of the run, that it takes in this tick; None for a
            stage without a batch.
    """

    steps: tuple[int | None, ...]

    @property
    def has_loss(self) -> bool:
        """Whether the last stage has a batch, so that a loss comes; under `al` and `penalty` the one that enters."""
        return self.steps[-1] is not None


class Wavefront:
    """Batches under way between the stage where they enter, the last or the first, and the one where they leave.

    Args:
        num_stages: number of stages K.
        stage_id: this rank's stage k.
        lag: ticks from a stage to the one before it: 1 under `al`, 0 under `penalty`, -1 under `local`.

    Attributes:
        tick: number of the present tick, since the wavefront was last empty.
        num_batches: batches that have entered since then.
    """

    def __init__(self, num_stages: int, stage_id: int, *, lag: int) -> None:
        self.num_stages, self.stage_id, self.lag = num_stages, stage_id, lag
        self.tick = self.num_batches = self._first_step = 0
        self._unread: deque[Iterator[Any] | None] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether every stage has treated every batch that has entered."""
        return self.num_batches == 0 or self.tick >= self.num_batches + abs(self.lag) * (self.num_stages - 1)

    @property
    def will_be_full(self) -> bool:
        """Whether every stage has a batch in the tick that the next batch enters in."""
        fill = abs(self.lag) * (self.num_stages - 1)
        return fill == 0 or (not self.is_empty and self.tick >= fill)

    @property
    def num_unread(self) -> int:
        """Batches that have entered and that this stage has yet to treat."""
        return len(self._unread)

    def enter(self, data: Iterator[Any] | None, *, step: int) -> None:
        """Let a batch enter.

        Args:
            data: every stage reads the batch from here, in its turn.
            step: optimizer steps that this rank has taken; counts where the wavefront is empty, when it is the same on
                all ranks.
        """
        if self.is_empty:
            self.tick, self.num_batches, self._first_step = 0, 0, step
            self._unread.clear()
        self.num_batches += 1
        self._unread.append(data)

    def present(self) -> Tick:
        """What the stages do in the present tick."""
        size = {"num_stages": self.num_stages, "num_batches": self.num_batches, "lag": self.lag}
        batches = (wavefront_batch(self.tick, stage, **size) for stage in range(self.num_stages))
        return Tick(tuple(None if batch is None else self._first_step + batch for batch in batches))

    def take_data(self) -> Iterator[Any] | None:
        """The iterator that holds this stage's batch of the present tick.

        None for a stage without a batch, and for a batch that was under way when the run was saved.
        """
        return None if self.present().steps[self.stage_id] is None else self._unread.popleft()

    def advance(self) -> None:
        """End the present tick."""
        self.tick += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the batches under way are; not their data."""
        return {
            "tick": self.tick,
            "num_batches": self.num_batches,
            "first_step": self._first_step,
            "num_unread": len(self._unread),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; the data of the batches come from the iterator of the next call."""
        self.tick, self.num_batches = state["tick"], state["num_batches"]
        self._first_step = state["first_step"]
        self._unread = deque([None] * state["num_unread"])
