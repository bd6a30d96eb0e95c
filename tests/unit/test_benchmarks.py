"""The arithmetic of the benchmarks: grids, what a stopped study still has to run, shares, tables. No process starts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import choices  # noqa: E402 - scripts, found beside the other benchmarks
import config_table  # noqa: E402
import input as input_speed  # noqa: E402
import report  # noqa: E402
import seeds  # noqa: E402
import sleepers  # noqa: E402
import waits  # noqa: E402

BASE = {
    "beta": 10.0,
    "rho": 1.0,
    "gamma": 1.0,
    "depth": 1,
    "width": 1.0,
    "segment": "light",
    "transport": "full",
    "overlap": False,
}
ENVIRONMENT = {
    "cores": 2,
    "cpu": "a processor",
    "gpus": [],
    "versions": {"torch": "1", "deepspeed": "2", "dali": None},
    "started_utc": "2026-01-02T03:04:05+00:00",
}


def final(accuracy: float, *, seed: int = 0, method: str = "al", **changes: Any) -> dict[str, Any]:
    fields = {"test_accuracy": accuracy, "seed": seed, "method": method, "epochs": 20, "exact_epochs": 0}
    mismatch = [] if method == "1f1b" else [0.02, 0.04]
    return {**fields, "stages": 3, "boundary_mismatch": mismatch, "bounds": [0, 3, 6, 11], **changes}


def run_row(suite: str, case: str, result: dict[str, Any], *changes: str) -> dict[str, Any]:
    overrides = [f"dsaux.run.seed={result['seed']}", *changes]
    return {"suite": suite, "case": case, "overrides": overrides, "final": result, "environment": ENVIRONMENT}


def choice_row(group: str, value: Any, *, accuracy: float | None, seed: int = 0, digest: str = "d") -> dict[str, Any]:
    return {
        "group": group,
        "value": value,
        "seed": seed,
        "base": BASE,
        "config_digest": digest,
        "case": "choices",
        "failed": accuracy is None,
        "error": None if accuracy is not None else "FloatingPointError: the loss is nan",
        "final": None if accuracy is None else final(accuracy, seed=seed),
        "environment": {} if accuracy is None else ENVIRONMENT,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- choices --------------------------------------------------------------------------------------------------------


def test_a_grid_has_the_base_once_and_never_again_as_a_value() -> None:
    points = choices.grid(BASE, choices.GROUPS)
    assert len(points) == len(set(points)) == 1 + sum(len(values) - 1 for values in choices.GROUPS.values())
    assert [point for point in points if point.group == choices.BASE] == [choices.Choice("base", None)]
    assert all(point.value != BASE[point.group] for point in points[1:])


def test_a_value_is_written_as_the_configuration_reads_it() -> None:
    assert choices.Choice("base", None).overrides == []
    assert choices.Choice("overlap", True).overrides == ["dsaux.aux.overlap=true"]
    assert choices.Choice("segment", "full").overrides == ['dsaux.aux.segment="full"']


def study(**changes: Any) -> choices.Study:
    fields = {"config": Path("choices.json"), "overrides": (), "base": BASE, "digest": "d"}
    return choices.Study(**{**fields, "choices": tuple(choices.grid(BASE, ["rho"])), **changes})


def test_a_run_whose_line_is_there_is_not_missing_and_a_failed_one_counts() -> None:
    rows = [choice_row("base", None, accuracy=0.8), choice_row("rho", 10, accuracy=None)]
    assert choices.missing(study(), rows, seed=0) == [choices.Choice("rho", 0.1)]
    assert len(choices.missing(study(), rows, seed=1)) == 3


def test_lines_of_a_changed_configuration_are_not_mixed_in() -> None:
    with pytest.raises(ValueError, match="Give the changed configuration another file name"):
        choices.missing(study(), [choice_row("base", None, accuracy=0.8, digest="other")], seed=0)


def test_the_base_stands_at_its_own_value_in_every_group() -> None:
    rows = [choice_row("base", None, accuracy=0.8), choice_row("beta", 30, accuracy=0.7)]
    assert [value for value, _ in choices.points(rows, "beta")] == [10, 30]
    assert choices.points(rows, "rho") == []


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("[rank 1 on vm] error: FloatingPointError: nan\n[launch] exits with 1\n", "FloatingPointError: nan"),
        ("Traceback\nKilled\n\n", "Killed"),
        ("", "no output"),
    ],
)
def test_the_last_error_is_found_in_a_launchers_output(output: str, error: str) -> None:
    assert seeds.last_error(output) == error


# ---- waits ----------------------------------------------------------------------------------------------------------


def test_theory_is_the_bubble_of_1f1b() -> None:
    assert waits.theory_busy("1f1b", stages=4, micro_batches=1) == 0.25
    assert waits.theory_busy("1f1b", stages=4, micro_batches=12) == 0.8
    assert waits.theory_busy("al", stages=4, micro_batches=1) == 1.0


def test_busy_is_sleep_and_aux_net_over_the_window_and_waits_are_not_busy() -> None:
    plan = waits.Plan(schedules=("al",), stages=2, steps=10)
    blocks = [
        [waits.Window(window_s=1.0, stage_s=0.8, aux_s=0.1, waited_s=0.05), waits.Window(1.0, 0.7, 0.1, 0.1)],
        [waits.Window(window_s=2.0, stage_s=1.8, aux_s=0.1, waited_s=0.02), waits.Window(2.0, 1.6, 0.2, 0.2)],
    ]
    row = waits.summary(plan, schedule="al", blocks=blocks, environment={**ENVIRONMENT, "host": "h", "command": "c"})
    assert row["busy"] == [[0.925, 0.9, 0.95], [0.85, 0.8, 0.9]]
    assert row["aux_share"] == [0.075, 0.1]
    assert row["wait_share"] == [0.03, 0.1]
    assert row["step_s"] == [0.15, 0.1, 0.2]
    assert row["n"] == 2
    assert row["environment"] == ENVIRONMENT
    assert waits.summary(plan, schedule="1f1b", blocks=blocks, environment=ENVIRONMENT)["wait_share"] == []


def test_forward_and_backward_sleeps_are_drawn_apart_and_the_halves_of_a_pass_are_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two micro-batches, all forward passes first or by turns: the same sleeps, whatever the schedule."""
    slept: list[float] = []
    monkeypatch.setattr(sleepers.time, "sleep", slept.append)
    sleeper = sleepers.Sleeper(forward_s=1.0, backward_s=2.0, jitter=0.5)
    layer, x = sleepers.SleepingLayer(torch.nn.Linear(2, 2), sleeper), torch.ones(1, 2)
    sleeper.seed("0/0/0")
    for _ in range(2):
        layer(x).sum().backward()
    first, first_half, first_other, second, second_half, second_other = slept
    slept.clear()
    sleeper.seed("0/0/0")
    outputs = [layer(x).sum() for _ in range(2)]
    for output in outputs:
        output.backward()
    assert slept == [first, second, first_half, first_other, second_half, second_other]
    assert (first_half, second_half) == (first_other, second_other)
    assert len({first, second, first_half, second_half}) == 4


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_a_difference_is_paired_by_seed() -> None:
    ours = [final(0.80, seed=0), final(0.78, seed=1), final(0.10, seed=9)]
    twins = [final(0.79, seed=1), final(0.79, seed=0)]
    assert report.paired_difference(ours, twins) == "+0.000 ± 0.010"
    assert report.paired_difference(ours[:1], twins) == "+0.010 (one pair)"
    assert report.paired_difference(ours[2:], twins) == "-"


def test_the_accuracy_table_compares_with_the_twin_of_its_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three, five = "resnet20, 3 stages", "resnet32, 5 stages"
    monkeypatch.setattr(report, "ACCURACY_SUITES", (three, five))
    rows = [
        run_row(three, "k3", final(0.80, seed=0, boundary_adjoint=[1.5, 2.0])),
        run_row(three, "k3", final(0.82, seed=1, boundary_adjoint=[1.7, 2.2])),
        run_row(three, "k3_1f1b", final(0.81, seed=0, method="1f1b")),
        run_row(three, "k3_1f1b", final(0.81, seed=1, method="1f1b")),
        run_row(three, "k3", final(0.83, seed=0), "dsaux.aux.rho=0.1"),
        run_row(five, "k5", final(0.70, method="al+1f1b", exact_epochs=4)),
        run_row(report.SEEDS_SUITES[0], "quickstart", final(0.5)),
    ]
    monkeypatch.setattr(report, "SEEDS", write(tmp_path / "seeds.jsonl", rows))
    table = report.accuracy_table()
    assert (
        f"| {three} | `al` | `k3` | - | 0.810 (0.800 to 0.820) | 2 | +0.000 ± 0.010 | 20 | 0 | 0.020, 0.040 |" in table
    )
    assert "| 1.60, 2.10 |" in table
    assert f"| {three} | `1f1b` | `k3_1f1b` | - | 0.810 (0.810 to 0.810) | 2 | - | 20 | 0 | - | - |" in table
    assert f"| {five} | `al+1f1b` | `k5` | - | 0.700 (0.700 to 0.700) | 1 | - | 20 | 4 | 0.020, 0.040 | - |" in table
    assert f"| {three} | `al` | `k3` | `aux.rho=0.1` | 0.830 (0.830 to 0.830) | 1 |" in table
    assert "quickstart" not in table


def test_a_suite_of_no_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "seeds.jsonl", [run_row("new", "c", final(0.5))])
    monkeypatch.setattr(report, "SEEDS", path)
    with pytest.raises(ValueError, match="'new', which belongs to no table"):
        report.accuracy_table()


def test_the_waits_table_shows_the_newest_line_of_each_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "schedule": "al",
        "stages": 2,
        "micro_batches": 1,
        "forward_ms": 40.0,
        "backward_ms": 80.0,
        "jitter": 0.0,
        "steps": 20,
        "n": 5,
        "busy": [[0.96, 0.95, 0.97], [0.98, 0.97, 0.99]],
        "aux_share": [0.01, 0.02],
        "wait_share": [0.03, 0.01],
        "step_s": [0.125, 0.124, 0.13],
        "theory_busy": 1.0,
        "environment": ENVIRONMENT,
    }
    rows = [{**row, "n": 1}, row, {**row, "schedule": "1f1b", "aux_share": [0.0, 0.0], "wait_share": []}]
    monkeypatch.setattr(report, "WAITS", write(tmp_path / "waits.jsonl", rows))
    table = report.waits_table()
    figures = "2 | 1 | 40 + 80 | 0 | 96.0, 98.0 | 95.0 to 99.0"
    end = "100.0 | 125 (124 to 130) | 5 of 20 steps |"
    assert f"| `al` | {figures} | 1.0, 2.0 | 3.0, 1.0 | {end}" in table
    assert f"| `1f1b` | {figures} | - | - | {end}" in table
    assert "1 of 20 steps" not in table


def test_the_choices_table_shows_where_the_method_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        choice_row("base", None, accuracy=0.80, seed=0),
        choice_row("base", None, accuracy=0.82, seed=1),
        choice_row("beta", 1, accuracy=None),
        choice_row("overlap", True, accuracy=0.79),
    ]
    monkeypatch.setattr(report, "CHOICES", write(tmp_path / "choices.jsonl", rows))
    table = report.choices_table()
    assert "| `choices` | `beta` | 1 | - | 0 | - | 1: FloatingPointError: the loss is nan |" in table
    assert "| `choices` | `beta` | 10 (base) | 0.810 (0.800 to 0.820) | 2 | 0.020, 0.040 | - |" in table
    assert "| `choices` | `overlap` | false (base) | 0.810 (0.800 to 0.820) | 2 |" in table
    assert "| `choices` | `overlap` | true | 0.790 (0.790 to 0.790) | 1 |" in table
    assert "`rho`" not in table


def test_a_configurations_result_is_of_its_own_method_alone() -> None:
    rows = [
        run_row("s", "quickstart", final(0.10, seed=0, method="penalty")),  # by an older file of this name
        run_row("s", "quickstart", final(0.80, seed=0)),
        run_row("s", "quickstart", final(0.82, seed=1)),
        run_row("s", "quickstart", final(0.20, seed=2), "dsaux.aux.beta=3"),
        run_row("s", "quickstart", final(0.30, seed=0, method="al+1f1b")),
        run_row("s", "quickstart_1f1b", final(0.40, seed=0, method="1f1b")),
    ]
    assert config_table.result_of("quickstart", rows, method="al") == "0.810 (0.800 to 0.820), n = 2"
    assert config_table.result_of("quickstart", rows, method="al+1f1b") == "0.300, n = 1"
    assert config_table.result_of("quickstart", rows, method="local") == "not measured yet"
    (line,) = (line for line in config_table.config_table(rows).splitlines() if "`quickstart`" in line)
    assert line.endswith("| 0.810 (0.800 to 0.820), n = 2 |")


def test_a_table_without_markers_or_data_is_named_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_data() -> str:
        raise ValueError("x.jsonl is missing or empty")

    tables = {
        "a": report.TableOfDocument("D.md", lambda: "new"),
        "b": report.TableOfDocument("D.md", lambda: "new"),
        "c": report.TableOfDocument("D.md", no_data),
        "d": report.TableOfDocument("OTHER.md", no_data),
    }
    monkeypatch.setattr(report, "TABLES", tables)
    text = "<!-- begin a -->\nold\n<!-- end a -->\n"
    new, lacking = report.with_tables(text, document="D.md")
    assert new == text.replace("old", "new")
    assert [line.partition(":")[0] for line in lacking] == ["table b of D.md", "table c of D.md"]
    assert "D.md lacks the markers <!-- begin b -->" in lacking[0]


def test_input_speed_takes_turns_leaves_the_warmup_out_and_counts_samples(monkeypatch) -> None:
    """A clock that batches move: each takes as long as its pipeline says, the warm-up ten times that."""
    now, opened = [0.0], []
    monkeypatch.setattr(input_speed.time, "perf_counter", lambda: now[0])
    plan = input_speed.Plan(("photos",), ("slow", "fast"), batch_size=4, batches=5, blocks=3, warmup=2)

    @contextlib.contextmanager
    def pipeline(_dataset: Any, plan: Any, *, seconds: float):
        def batches():
            for number in itertools.count():
                is_warmup = number % (plan.warmup + plan.batches) < plan.warmup
                now[0] += 10 * seconds if is_warmup else seconds
                yield None, [0] * plan.batch_size

        opened.append(seconds)
        yield batches()
        opened.remove(seconds)

    table = {name: functools.partial(pipeline, seconds=s) for name, s in (("slow", 2.0), ("fast", 0.5))}
    monkeypatch.setattr(input_speed, "PIPELINES", table)
    speeds = input_speed.measure(plan, None)
    assert speeds == {"slow": [pytest.approx(2.0)] * 3, "fast": [pytest.approx(8.0)] * 3}
    assert opened == []
    row = input_speed.summary(plan, dataset="photos", pipeline="slow", speeds=[1, 3, 2], environment=ENVIRONMENT)
    assert row["samples_per_s"] == [2, 1, 3]
    assert row["n"] == 3
    assert json.loads(json.dumps(row))["environment"]["cpu"] == "a processor"
    assert input_speed.rich_table([row]).row_count == 1
