"""The file of measured times that one machine writes and another reads. Used by `python -m dsaux.plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dsaux.config_rules import ConfigError, show
from dsaux.partition import LayerTimes
from dsaux.plan_workload import IMPOSSIBLE, BackwardSplit, SegmentCost, Workload, mix_costs

FORMAT = 2


def to_json(workload: Workload) -> str:
    """Everything that was measured or asked so far, as one JSON object; docs/planner.md describes it."""
    document = {
        "format": FORMAT,
        "network": workload.network,
        "device": workload.device,
        "timed_up_to": workload.timed_up_to,
        "overhead_s": workload.overhead_s,
        "states_per_parameter": workload.states_per_parameter,
        "aux_states_per_parameter": workload.aux_states_per_parameter,
        "layers": [
            {"name": name, "update_s": update, "parameter_bytes": size, "activation_bytes": after}
            | {"kept_bytes": kept, "kept_before_bytes": before, "kind": workload.kind(index + 1)}
            for index, (name, update, size, after, kept, before) in enumerate(
                zip(
                    workload.layer_names,
                    workload.update_s,
                    workload.parameter_bytes,
                    workload.activation_bytes,
                    workload.kept_bytes,
                    workload.kept_before_bytes or (0,) * workload.num_layers,
                    strict=True,
                )
            )
        ],
        "times": [
            {"micro_batch_size": size, "forward_s": [t.forward_s for t in times]}
            | {"backward_s": [t.backward_s for t in times]}
            for size, times in sorted(workload._layers.items())
        ],
        "has_segments": workload.segment_cost is not None,
        "segments": [
            {"source": source, "target": target, "micro_batch_size": size, "cost": _cost_to_json(cost)}
            for (source, target, size), cost in workload._segments.items()
        ],
        "splits": [{"micro_batch_size": size} | asdict(split) for size, split in sorted(workload._splits.items())],
        "has_heads": workload.head_cost is not None,
        "heads": [
            {"cut": cut, "micro_batch_size": size, "cost": _cost_to_json(cost)}
            for (cut, size), cost in workload._heads.items()
        ],
    }
    return json.dumps(document, indent=1)


def from_json(text: str, *, source: str = "the times") -> Workload:
    """Read what `to_json` gave.

    Args:
        text: the JSON.
        source: the file's name, for errors.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        return _from_document(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{source} cannot be read as measured times: {_reason(error)}. Give a file that "
            "python -m dsaux.plan --save_times wrote."
        ) from error


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"it is no JSON ({error})"
        case KeyError():
            return f"it has no entry {show(error.args[0])}"
        case ValueError():
            return str(error)
    return "it is built otherwise"


def _cost_to_json(cost: SegmentCost) -> dict[str, Any] | None:
    return asdict(cost) if cost.is_possible else None


def _cost_from_json(block: Mapping[str, Any] | None) -> SegmentCost:
    return IMPOSSIBLE if block is None else SegmentCost(**block)


def _from_document(document: Mapping[str, Any]) -> Workload:
    if document["format"] != FORMAT:
        raise ValueError(f"it has format {show(document['format'])}, this version reads {FORMAT}")
    layers = document["layers"]
    aux_states = document.get("aux_states_per_parameter")  # this and `kept_before_bytes`: not in files of old
    segments: dict[tuple[int | None, int], dict[int, SegmentCost]] = {}
    for entry in document["segments"]:
        table = segments.setdefault((entry["source"], entry["target"]), {})
        table[int(entry["micro_batch_size"])] = _cost_from_json(entry["cost"])
    heads: dict[int, dict[int, SegmentCost]] = {}
    for entry in document["heads"]:
        heads.setdefault(entry["cut"], {})[int(entry["micro_batch_size"])] = _cost_from_json(entry["cost"])

    def segment_cost(source: int | None, target: int, size: int) -> SegmentCost:
        # What was never asked on the other machine was not needed for a cut there; it is no cut here.
        return mix_costs(segments[source, target], size) if (source, target) in segments else IMPOSSIBLE

    def head_cost(cut: int, size: int) -> SegmentCost:
        return mix_costs(heads[cut], size) if cut in heads else IMPOSSIBLE

    workload = Workload(
        layer_names=tuple(str(layer["name"]) for layer in layers),
        times={
            int(entry["micro_batch_size"]): tuple(
                LayerTimes(float(forward), float(backward))
                for forward, backward in zip(entry["forward_s"], entry["backward_s"], strict=True)
            )
            for entry in document["times"]
        },
        update_s=tuple(float(layer["update_s"]) for layer in layers),
        parameter_bytes=tuple(int(layer["parameter_bytes"]) for layer in layers),
        activation_bytes=tuple(int(layer["activation_bytes"]) for layer in layers),
        kept_bytes=tuple(int(layer["kept_bytes"]) for layer in layers),
        segment_cost=segment_cost if document["has_segments"] else None,
        head_cost=head_cost if document["has_heads"] else None,
        kinds=tuple(int(layer["kind"]) for layer in layers),
        overhead_s=float(document["overhead_s"]),
        states_per_parameter=float(document["states_per_parameter"]),
        aux_states_per_parameter=None if aux_states is None else float(aux_states),
        kept_before_bytes=tuple(int(layer.get("kept_before_bytes", 0)) for layer in layers),
        network=str(document["network"]),
        device=str(document["device"]),
        timed_up_to=int(document["timed_up_to"]),
        splits={
            int(entry["micro_batch_size"]): BackwardSplit(float(entry["input_share"]), float(entry["weight_share"]))
            for entry in document["splits"]
        },
    )
    for (source, target), known in segments.items():
        workload._segments.update({(source, target, size): cost for size, cost in known.items()})
    for cut, known in heads.items():
        workload._heads.update({(cut, size): cost for size, cost in known.items()})
    return workload
