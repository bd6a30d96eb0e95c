"""The benchmark of one device: its steps are right, its graphs change nothing, and a CPU says what it leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_capture import FakeCapture

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import device  # noqa: E402 - scripts, found beside the other benchmarks
import device_plan  # noqa: E402
import device_tables  # noqa: E402
import stage_step  # noqa: E402

CPU = torch.device("cpu")
WITHOUT_PACKAGES = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "nvidia", "torchvision", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, "benchmarks")
import device
sys.exit(device.main())
"""


def step_of(index: int, *, precision: str = "fp32") -> stage_step.StageStep:
    measurement = device_plan.Measurement(device_plan.TINY, index, precision, "eager")
    return stage_step.StageStep(measurement.stage(), CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_graphed_step_has_the_losses_of_an_eager_one(index: int, precision: str) -> None:
    """To the bit: the fake capture runs the same kernels."""
    eager = stage_step.losses(stage_step.Eager(step_of(index, precision=precision)), 10)
    capture = FakeCapture()
    graphed = stage_step.losses(stage_step.Graphed(step_of(index, precision=precision), capture), 10)
    assert graphed == eager
    assert len(capture.recordings) == 1
    assert len(set(eager)) == 10


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_segment_aside_gives_the_gradients_of_the_plain_order(index: int) -> None:
    """But for the order in which the two gradients of a boundary are added up."""
    stage = device_plan.Measurement(replace(device_plan.TINY, stages=3), index, "fp32", "graphed aside").stage()
    found = []
    for kind in (stage_step.StageStep, stage_step.AsideStep):
        step = kind(stage, CPU)
        step.load(0)
        step.passes()
        found.append((step.loss, [weight.grad for weight in (*step.weights, *step.aux_weights)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert all(bool(gradient.any()) for gradient in found[0][1])


def test_the_only_stage_is_the_plain_loop() -> None:
    whole = device_plan.Network("resnet8", 1, 8, 16)
    stage = device_plan.Measurement(whole, 0, "fp32", "eager").stage()
    one = stage_step.losses(stage_step.Eager(stage_step.StageStep(stage, CPU)), 3)
    step = stage_step.StageStep(stage, CPU)
    optimizer = torch.optim.SGD(step.network.parameters(), **stage_step.SGD)
    two = []
    for inputs, labels in step.batches[:3]:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(step.network(inputs), labels)
        loss.backward()
        optimizer.step()
        two.append(float(loss.detach()))
    assert one == two


def test_a_stage_holds_its_part_of_the_auxnet_alone() -> None:
    stage = device_plan.Network("resnet8", 3, 4, 16)
    depths = []
    for index in range(3):
        step = stage_step.StageStep(device_plan.Measurement(stage, index, "fp32", "eager").stage(), CPU)
        assert step.aux_net is not None
        depths.append(len(step.aux_net.segments))
    assert depths == [1, 2, 2]


def test_the_plan_begins_with_resnet110_and_names_no_line_twice() -> None:
    measurements = device_plan.plan(quick=False)
    assert measurements[0].network == device_plan.RESNET110
    assert len(set(measurements)) == len(measurements)
    assert {one.mode for one in measurements} == {
        "eager",
        "graphed",
        "graphed aside",
        "compiled",
        "compiled graphed",
        "bare",
    }


def test_a_quick_run_on_a_cpu_needs_neither_deepspeed_nor_torchvision_and_says_what_it_skips(tmp_path: Path) -> None:
    out = tmp_path / "device.jsonl"
    arguments = ["--quick", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 2 + 2 + 2 * 2 * 4
    assert {row["skipped"] for row in rows if row["kind"] == "engine"} == {"deepspeed is missing"}
    assert all(row["failed"] is None and row["environment"]["versions"]["torch"] for row in rows)
    skipped = {row["mode"]: row["skipped"] for row in rows if row["kind"] == "step"}
    compiled = {"compiled": device.COMPILED_ON_CPU, "compiled graphed": device.NO_GRAPHS}
    assert skipped == {"eager": None, "graphed": device.NO_GRAPHS, **compiled}
    for row in rows:
        if row["kind"] == "step" and row["skipped"] is None:
            assert row["step_s"][1] <= row["step_s"][0] <= row["step_s"][2]
            assert row["aux_share"] > 0
            assert row["flops"] > 0
    assert "skipped, a CPU has no graphs" in done.stdout


def test_the_engine_is_run_with_and_without_the_key_where_deepspeed_is(tmp_path: Path) -> None:
    out = tmp_path / "device.jsonl"
    command = [sys.executable, "benchmarks/device.py", "--quick", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in lines if row["kind"] == "engine"]
    assert [row["case"] for row in rows] == [f"resnet8, batch 8, K=1, {name}" for name in ("fp32", "bf16")]
    for row in rows:
        assert row["graphed_largest_difference"] == 0.0
        assert row["first_loss"] != row["last_loss"]
        (told,) = row["told"]
        assert "the device is cpu, and only GPUs have them" in told


def test_a_spent_budget_leaves_the_rest_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "device.jsonl"
    command = ["device.py", "--quick", "--device", "cpu", "--budget_s", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert device.main() == 0
    assert "16 measurements were left out" in capsys.readouterr().out
    assert not out.exists()


def test_what_a_file_has_is_left_out_where_lines_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, first = tmp_path / "device.jsonl", device_plan.plan(quick=True)[0]
    row = device.measured_row(first, device=CPU, peak=1.0, quick=True)
    engine = {"kind": "engine", "skipped": "deepspeed is missing", "failed": None}
    engine["case"] = device.engine_case(device_plan.TINY, "fp32")
    there = [row, {**row, "mode": "graphed", "failed": "no"}, engine]
    out.write_text("".join(json.dumps(line) + "\n" for line in there))
    asked: list[str] = []
    engines: list[str] = []
    monkeypatch.setattr(device, "measured_row", lambda one, **_: asked.append(one.mode) or {**row, "mode": one.mode})
    monkeypatch.setattr(device, "engine_row", lambda _, precision, **__: engines.append(precision) or engine)
    monkeypatch.setattr(sys, "argv", ["device.py", "--quick", "--device", "cpu", "--add", "--out", str(out)])
    assert device.main() == 0
    assert (len(asked), asked[0]) == (len(device_plan.plan(quick=True)) - 1, "graphed")
    assert engines == ["bf16"]


def test_a_failure_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nsecond line")

    monkeypatch.setattr(device, "_figures", fail)
    (first, *_) = device_plan.plan(quick=True)
    row = device.measured_row(first, device=CPU, peak=1.0, quick=True)
    assert row["failed"] == "RuntimeError: out of memory"
    assert device.said(row).endswith("failed, RuntimeError: out of memory")


def line(mode: str, step_s: float) -> dict[str, Any]:
    (first, *_) = device_plan.plan(quick=True)
    row = device.measured_row(replace(first, mode=mode), device=CPU, peak=1.0, quick=True)
    environment = {"cores": 2, "cpu": "c", "gpus": ["G"], "versions": {}, "started_utc": "2026-01-02T"}
    environment["versions"] = {"torch": "1", "deepspeed": None, "dali": None}
    figures = {"aux_share": 0.25, "flops_per_s": 2e12, "share_of_peak": 0.5, "peak_memory_bytes": 2**30}
    common = {"suite": "device", "machine_was_busy": False, "environment": environment, "skipped": None}
    return {**row, **figures, **common, "step_s": [step_s, step_s, step_s]}


def test_the_table_sets_graphed_beside_eager_steps(tmp_path: Path) -> None:
    path = tmp_path / "device.jsonl"
    assert device_tables.device_table(path) == "Not measured yet: `python benchmarks/device.py` on a GPU."
    equality = {
        **line("eager", 0.0),
        "kind": "equality",
        "steps": 200,
        "first_loss": 2.0,
        "last_loss": 1.0,
        "eager_largest_difference": 0.0,
        "graphed_largest_difference": 1e-6,
    }
    engine = {**equality, "kind": "engine", "case": "e", "eager_s": [0.003, 0.004], "graphed_s": [0.001], "told": []}
    rows = [equality, engine, line("eager", 0.009), line("eager", 0.008), line("graphed", 0.002)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = device_tables.device_table(path)
    assert (
        "| resnet8, 8 | 0 of 2 | fp32 | 8.00 | - | 2.00 | - | - | 4.00 | - | 25 % | 2.0 (50 %) | 1.00 GiB / 1.00 GiB |"
        in table
    )
    assert "200 losses of a graphed run differ from an eager one's by 1e-06 at most" in table
    assert "The engine, e: 3.50 ms a step, 1.00 ms with `cuda_graphs`; 200 losses differ by 1e-06 at most." in table
