"""What several GPUs would do, from stages timed on one: the planner gets what was measured, in the right places."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import device_forecast  # noqa: E402 - scripts, found beside the other benchmarks
import device_plan  # noqa: E402

NETWORK = device_plan.Network("resnet8", 3, 64, 16)


def line(stage: int, *, step_s: float, aux_s: float, mode: str = "graphed", **other: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "failed": None,
        "skipped": None,
        "channels_last": True,
        "mode": mode,
        "precision": "bf16",
        "stage": stage,
        "step_s": [step_s, step_s, step_s],
        "aux_s": aux_s,
        "aux_share": aux_s / step_s,
        **{key: getattr(NETWORK, key) for key in ("model", "stages", "batch", "image_size", "segment", "width")},
        **other,
    }


def three_stages() -> list[dict[str, Any]]:
    return [line(0, step_s=0.5, aux_s=0.1), line(1, step_s=0.7, aux_s=0.3), line(2, step_s=0.6, aux_s=0.3)]


def test_dsaux_takes_what_its_slowest_stage_was_measured_to_take() -> None:
    work = device_forecast.workload_of(NETWORK, precision="bf16", rows=three_stages())
    assert [time.total_s for time in work.layer_times(64)] == pytest.approx([0.4, 0.4, 0.3])
    assert [work.segment(None, 1, 64).backward_s, work.segment(1, 2, 64).backward_s] == pytest.approx([0.1, 0.2])
    found = device_forecast._predict(work, NETWORK, "dsaux-al", 1)
    assert found.step_s == pytest.approx(0.7, rel=1e-3)
    assert found.aux_share == pytest.approx(0.3 / 0.3)


def test_an_even_cut_gives_every_rank_the_mean_of_stage_and_auxnet() -> None:
    work = device_forecast.workload_of(NETWORK, precision="bf16", rows=three_stages(), even=True)
    assert [time.total_s for time in work.layer_times(64)] == pytest.approx([0.5, 0.3, 0.3])
    assert device_forecast._predict(work, NETWORK, "dsaux-al", 1).step_s == pytest.approx(0.6, rel=1e-3)


def test_exact_pipelines_get_even_stages_and_no_auxnet() -> None:
    work = device_forecast.workload_of(NETWORK, precision="bf16", rows=three_stages(), even=True, has_aux=False)
    found = device_forecast._predict(work, NETWORK, "deepspeed-1f1b", 4)
    mean = (0.4 + 0.4 + 0.3) / 3
    assert found.step_s == pytest.approx(mean * (4 + 3 - 1) / 4, rel=1e-2)


def test_a_boundary_has_the_bytes_of_its_precision() -> None:
    sizes = {
        precision: device_forecast.workload_of(NETWORK, precision=precision, rows=three_stages()).activation_bytes
        for precision in ("bf16", "fp32")
    }
    assert [2 * size for size in sizes["bf16"]] == list(sizes["fp32"])
    assert sizes["fp32"][-1] == 4 * NETWORK.num_classes


def test_only_networks_with_a_time_for_each_stage_are_taken_and_the_newest_of_each() -> None:
    rows = [
        *three_stages(),
        line(2, step_s=0.9, aux_s=0.3),
        line(0, step_s=0.5, aux_s=0.1, mode="compiled graphed"),
        line(1, step_s=0.1, aux_s=0.0, failed="no memory"),
        line(1, step_s=0.1, aux_s=0.0, channels_last=False),
        line(0, step_s=9.0, aux_s=0.0, mode="eager"),
        {"kind": "engine"},
    ]
    found = device_forecast.complete_networks(rows)
    assert list(found) == [(NETWORK, "bf16", "graphed")]
    assert [row["step_s"][0] for row in found[NETWORK, "bf16", "graphed"]] == [0.5, 0.7, 0.9]


def test_without_complete_networks_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "device.jsonl"
    path.write_text(json.dumps(line(0, step_s=0.5, aux_s=0.1)) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run benchmarks/device\.py on a GPU"):
        device_forecast.forecast_table(path)
