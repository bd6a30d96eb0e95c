"""What several GPUs would do, by the planner, from the stages that `benchmarks/device.py` has timed on one of them.

Each stage is one layer of the planner's workload. `benchmarks/device.py` cuts by multiply-accumulates, which no GPU's
time goes by; a cut by measured times would be even, so everybody is predicted with even ranks as well, dsaux's AuxNet
counted. Two things flatter the exact pipelines: a micro-batch needs its share of the whole batch's time, the only one
that was measured, and they run their stages by graphs, as dsaux does, which their engines have not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from device_plan import Network
from markdown import environment_line, table_line
from seeds import Row, read_lines

from dsaux.models import boundary_specs
from dsaux.models.auxnet import build_aux_net
from dsaux.planner import LayerTimes, Link, Prediction, SegmentCost, Workload, predict

LINK = Link(300e9, 1e-5)
"""Between two GPUs of a host, in each direction; a guess."""
MODES = ("graphed", "compiled graphed")
"""Ways to run in which stages are compared, where all stages of a network have been timed so."""
MICRO_BATCHES = (4, 8, 32)
_BYTES = {"fp32": 4, "bf16": 2}
_HEADS = (
    "network, batch",
    "GPUs",
    "precision",
    "`dsaux-al` as cut, samples/s",
    "`dsaux-al` cut evenly",
    "AuxNet's share of all ranks' time",
    *(f"1F1B, M = {count}" for count in MICRO_BATCHES),
    "exact, never idle",
)


def forecast_table(path: Path) -> str:
    """A line for each network, precision and way to run whose stages have all been timed.

    Args:
        path: lines of `benchmarks/device.py`.

    Raises:
        ValueError: if no network's stages have all been timed.
    """
    complete = complete_networks(read_lines(path))
    if not complete:
        raise ValueError("no network has a time for each stage; run benchmarks/device.py on a GPU.")
    lines = [table_line(_HEADS), "|" + "---|" * len(_HEADS)]
    lines += [
        table_line(_cells(network, precision, mode, rows)) for (network, precision, mode), rows in complete.items()
    ]
    environments = [row["environment"] for rows in complete.values() for row in rows]
    return "\n".join([*lines, "", f"Predicted, not measured, from stages timed on {environment_line(environments)}"])


def complete_networks(rows: Sequence[Row]) -> dict[tuple[Network, str, str], list[Row]]:
    """The newest line of each stage, in order, by network, precision and mode, of networks that lack none."""
    found: dict[tuple[Network, str, str], dict[int, Row]] = {}
    for row in rows:
        if row["kind"] != "step" or row["failed"] or row["skipped"] or not row["channels_last"]:
            continue
        if row["stages"] > 1 and row["mode"] in MODES:
            keys = ("model", "stages", "batch", "image_size", "segment", "width")
            network = Network(**{key: row[key] for key in keys})
            found.setdefault((network, row["precision"], row["mode"]), {})[row["stage"]] = row
    return {
        key: [stages[index] for index in sorted(stages)]
        for key, stages in found.items()
        if len(stages) == key[0].stages
    }


def workload_of(
    network: Network, *, precision: str, rows: Sequence[Row], even: bool = False, has_aux: bool = True
) -> Workload:
    """A workload with a layer for each stage.

    The optimizer's step, the AuxNet's too, is part of the stage: it was not timed apart.

    Args:
        network: what was timed.
        precision: of activations.
        rows: a line for each stage, in order.
        even: make the ranks equal: each stage takes what its part of the AuxNet leaves of the mean time of a rank.
        has_aux: count the AuxNet; without it for what has none.
    """
    numbers, parameters = _sizes(network)
    aux_s = [float(row["aux_s"]) if has_aux else 0.0 for row in rows]
    # Stage k runs T_1 .. T_(k+1): what it takes longer for them than stage k-1 is T_(k+1).
    parts = [
        SegmentCost(backward_s=max(0.0, now - before), parameter_bytes=4 * count)
        for count, before, now in zip(parameters, [0.0, *aux_s], aux_s, strict=False)
    ]
    stage_s = [float(row["step_s"][0]) - float(row["aux_s"]) for row in rows]
    if even:
        rank_s = (sum(stage_s) + sum(aux_s)) / len(rows)
        stage_s = [max(0.0, rank_s - aux) for aux in aux_s]
    times = tuple(LayerTimes(seconds / 3, seconds * 2 / 3) for seconds in stage_s)  # a backward pass is twice as long
    nothing = (0,) * network.stages
    return Workload(
        layer_names=tuple(f"stage {index}" for index in range(network.stages)),
        times={network.batch: times},
        update_s=(0.0,) * network.stages,
        parameter_bytes=nothing,
        activation_bytes=tuple(_BYTES[precision] * count for count in numbers),
        kept_bytes=nothing,
        kinds=tuple(range(network.stages)),
        segment_cost=lambda source, target, size: parts[target - 1],
    )


@functools.cache
def _sizes(network: Network) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of one sample after each stage, and parameters of each of the AuxNet's segments."""
    image = (3, network.image_size, network.image_size)
    after = boundary_specs(list(network.layers), input_spec=image)
    ends = [after[cut - 1] for cut in network.bounds[1:]]
    with torch.device("meta"):
        net = build_aux_net([image, *ends[:-1]], segment=network.segment, width=network.width)
    return (
        tuple(math.prod(end.shape) for end in ends),
        tuple(sum(weight.numel() for weight in segment.parameters()) for segment in net.segments),
    )


def _cells(network: Network, precision: str, mode: str, rows: Sequence[Row]) -> list[str]:
    work, even = (workload_of(network, precision=precision, rows=rows, even=even) for even in (False, True))
    exact = workload_of(network, precision=precision, rows=rows, even=True, has_aux=False)
    as_cut, ours = (_predict(one, network, "dsaux-al", 1).samples_per_s for one in (work, even))
    aux_share = sum(float(row["aux_s"]) for row in rows) / sum(float(row["step_s"][0]) for row in rows)
    theirs = [_predict(exact, network, "deepspeed-1f1b", count).samples_per_s for count in MICRO_BATCHES]
    never_idle = network.batch / exact.layer_times(network.batch)[0].total_s
    return [
        f"{network.model}, {network.batch}",
        str(network.stages),
        f"{precision}, {mode}",
        f"{as_cut:,.0f}",
        f"{ours:,.0f}",
        f"{100 * aux_share:.0f} %",
        *(f"{speed:,.0f} ({ours / speed:.2f})" for speed in (*theirs, never_idle)),
    ]


def _predict(work: Workload, network: Network, contestant: str, micro_batches: int) -> Prediction:
    return predict(
        work,
        contestant,
        stages=network.stages,
        replicas=1,
        micro_batches=micro_batches,
        global_batch=network.batch,
        link=LINK,
        bounds=range(network.stages + 1),
    )
