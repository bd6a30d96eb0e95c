"""What every prediction starts from and ends with: `Setting`, `Cut`, `Step`; used by `dsaux.planner` and its parts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dsaux.partition import LayerTimes
from dsaux.plan_links import Link
from dsaux.plan_workload import Workload


@dataclass(frozen=True)
class Cut:
    """Where the network is cut.

    Attributes:
        bounds: layer indices; piece k holds layers bounds[k] .. bounds[k+1]-1.
    """

    bounds: tuple[int, ...]

    def fits(self, num_layers: int, *, pieces: int) -> bool:
        """Whether it cuts so many layers into so many pieces with a layer at least in each."""
        rises = all(low < high for low, high in itertools.pairwise(self.bounds))
        return rises and len(self.bounds) == pieces + 1 and self.bounds[0] == 0 and self.bounds[-1] == num_layers


@dataclass(frozen=True)
class Setting:
    """One contestant in one shape.

    Attributes:
        workload: times and sizes.
        contestant: its name.
        stages: stages K.
        replicas: replicas R.
        micro_batches: micro-batches M.
        micro_batch_size: samples in one.
        link: between ranks.
        cut: where the network is cut.
        cores: that the ranks share, as `dsaux.planner.predict` has it; None: a device each.
    """

    workload: Workload
    contestant: str
    stages: int
    replicas: int
    micro_batches: int
    micro_batch_size: int
    link: Link
    cut: Cut
    cores: int | None = None

    def piece(self, index: int) -> Piece:
        """One piece of the network."""
        first, last = self.cut.bounds[index], self.cut.bounds[index + 1]
        work, times = self.workload, self.workload.layer_times(self.micro_batch_size)[first:last]
        kept_bytes = sum(work.kept_bytes[first:last]) + sum(work.kept_before_bytes[first : first + 1])
        return Piece(
            times=LayerTimes(sum(time.forward_s for time in times), sum(time.backward_s for time in times)),
            update_s=sum(work.update_s[first:last]),
            parameter_bytes=sum(work.parameter_bytes[first:last]),
            kept_bytes=self.micro_batch_size * kept_bytes,
            output_bytes=self.micro_batch_size * work.activation_bytes[last - 1],
        )

    @property
    def held_per_parameter(self) -> float:
        """Bytes that a device holds per byte of parameters: weight, gradient, the optimizer's state."""
        return 2.0 + self.workload.states_per_parameter

    @property
    def aux_held_per_parameter(self) -> float:
        """The same per byte of the AuxNet's parameters."""
        states = self.workload.aux_states_per_parameter
        return self.held_per_parameter if states is None else 2.0 + states


@dataclass(frozen=True)
class Piece:
    """Layers between two cuts, for one micro-batch.

    Attributes:
        times: forward and backward pass.
        update_s: their optimizer step.
        parameter_bytes: of their parameters.
        kept_bytes: kept from forward to backward pass.
        output_bytes: what they hand on.
    """

    times: LayerTimes
    update_s: float
    parameter_bytes: int
    kept_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Step:
    """What a contestant's model gave, for one replica where nothing else is said.

    Attributes:
        seconds: of a step.
        busy_s: seconds that each rank computes.
        sent_bytes: of all ranks of all replicas.
        memory_bytes: of each rank.
        longest_stage_s: seconds of layers on the rank with most of them.
        aux_share: largest share of AuxNet or head time over layer time.
    """

    seconds: float
    busy_s: tuple[float, ...]
    sent_bytes: float
    memory_bytes: tuple[float, ...]
    longest_stage_s: float
    aux_share: float = 0.0
