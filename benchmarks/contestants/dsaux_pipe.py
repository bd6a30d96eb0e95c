"""dsaux's engine: each stage on a local loss, by the penalty, the augmented Lagrangian or the greedy method."""

from __future__ import annotations

from typing import Any

import torch
from work import OPTIMIZER, Work, loss_of

from contestants import Runner, Seat
from dsaux.bootstrap import initialize
from dsaux.models import boundary_specs
from dsaux.models.auxnet import build_aux_net
from dsaux.models.local_heads import build_local_heads
from dsaux.module import AuxPipelineModule
from dsaux.profile import InstructionClock


class _Pipe:
    """One rank's engine.

    Attributes:
        terms_s: seconds of each term of a step, as `dsaux.profile` has them, so far.
    """

    def __init__(self, work: Work, seat: Seat, schedule: str) -> None:
        self.engine = _engine(work, seat, schedule)
        self.fill = abs(self.engine.wavefront.lag) * (seat.ranks - 1)
        self._data = work.micro_batches(seat.micro_batches)
        self._clock = InstructionClock(self.engine).__enter__()

    @property
    def terms_s(self) -> dict[str, float]:
        return self._clock.terms()

    def step(self) -> float | None:
        loss = self.engine.train_batch(self._data)
        # Under the greedy method the last stage has no batch before the wavefront has reached it.
        return float(loss) if self.engine.is_last_stage() and self.engine.loss_is_known else None

    def drain(self) -> None:
        self.engine.drain()


def build(work: Work, seat: Seat, *, schedule: str) -> Runner:
    """This rank's runner."""
    return _Pipe(work, seat, schedule)


def _engine(work: Work, seat: Seat, schedule: str) -> Any:
    layers = list(work.layers)
    after = boundary_specs(layers, input_spec=work.input_spec)
    specs = [work.input_spec, *(after[cut - 1] for cut in seat.bounds[1:-1])]
    has_boundaries, is_greedy = seat.ranks > 1, schedule == "local"
    torch.manual_seed(work.seed)
    module = AuxPipelineModule(
        layers,
        num_stages=seat.ranks,
        bounds=seat.bounds,
        loss_fn=loss_of,
        aux_net=build_aux_net(specs, width=work.aux_width) if has_boundaries and not is_greedy else None,
        local_heads=build_local_heads(specs[1:], scores=after[-1]) if has_boundaries and is_greedy else None,
        seed=work.seed,
    )
    document = {
        "train_batch_size": work.global_batch,
        "gradient_accumulation_steps": seat.micro_batches,
        "optimizer": {"type": "SGD", "params": dict(OPTIMIZER)},
        "steps_per_print": 10**9,
        "dsaux": {
            "pipeline": {"stages": seat.ranks, "schedule": schedule},
            "data": {"loader": "torch"},
            "aux": {"width": work.aux_width},
        },
    }
    engine, _, _, _ = initialize(model=module, config=document)
    return engine
