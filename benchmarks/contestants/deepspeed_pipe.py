"""DeepSpeed's own pipeline engines: 1F1B, and DualPipeV with two chunks of the network on each rank.

They run as their users run them, with DeepSpeed's defaults, but for the cut: it is given here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from work import Work, loss_of

from contestants import Runner, Seat
from dsaux.module import NamedLayerSpec


class _Cut(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's `PipelineModule` with explicit bounds, for which it has no argument."""

    def __init__(self, bounds: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        self.__dict__["explicit_bounds"] = bounds  # nn.Module is not initialised yet
        super().__init__(*args, **kwargs)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = list(self.explicit_bounds)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


class _CutV(DualPipeVModule, _Cut):  # type: ignore[misc]
    """Rank r has pieces r and 2K-1-r; `DualPipeVModule` asks the class behind it for the bounds."""


MODULES: dict[str, Callable[..., PipelineModule]] = {"1f1b": _Cut, "dualpipev": _CutV}
"""By schedule. `deepspeed.initialize` takes the engine that belongs to the module."""


class _Pipe:
    fill = 0

    def __init__(self, work: Work, seat: Seat, schedule: str) -> None:
        specs = [NamedLayerSpec(layer, index, seed=work.seed) for index, layer in enumerate(work.layers)]
        with contextlib.redirect_stdout(io.StringIO()):
            module = MODULES[schedule](seat.bounds, specs, num_stages=seat.ranks, loss_fn=loss_of)
            self.engine, _, _, _ = deepspeed.initialize(
                model=module,
                optimizer=work.optimizer(module),
                config={
                    "train_batch_size": work.global_batch,
                    "gradient_accumulation_steps": seat.micro_batches,
                    "gradient_clipping": 0.0,
                    "steps_per_print": 10**9,
                },
            )
        self._has_loss = seat.rank == (seat.ranks - 1 if schedule == "1f1b" else 0)
        self._data = work.micro_batches(seat.micro_batches)

    def step(self) -> float | None:
        loss = self.engine.train_batch(self._data)
        return float(loss) if self._has_loss else None

    def drain(self) -> None:
        pass


def build(work: Work, seat: Seat, *, schedule: str) -> Runner:
    """This rank's runner for "1f1b" or "dualpipev"."""
    return _Pipe(work, seat, schedule)
