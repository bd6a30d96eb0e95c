"""The arithmetic of the benchmark against the peers: cases, lines of results, tables. Few processes start."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy  # noqa: E402 - scripts, found beside the other benchmarks
import cases  # noqa: E402
import crew  # noqa: E402
import duel  # noqa: E402
import duel_tables  # noqa: E402
import seeds  # noqa: E402
from contestants import CONTESTANTS, Seat  # noqa: E402
from sleepers import Sleeper, SleepingLayer  # noqa: E402
from work import NUM_BATCHES, model_work, sleeping_work  # noqa: E402

from dsaux.watch_board import process_exists  # noqa: E402

SUITES = ("sleep", "compute", "network")


class CountingSleeper(Sleeper):
    """Sleeps not at all, but says how long it would have."""

    def sleep(self, kind: str, *, samples: float) -> None:
        self.slept_s += samples * self.means_s[kind]


# ---- the work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_gradient", [False, True], ids=["first layer", "later layer"])
def test_a_sleeping_layer_sleeps_by_the_sample_and_as_long_without_a_gradient_of_its_input(
    needs_gradient: bool,
) -> None:
    sleeper = CountingSleeper(forward_s=1.0, backward_s=2.0)
    layer = SleepingLayer(torch.nn.Conv2d(3, 4, 1), sleeper)
    x = torch.zeros(5, 3, 2, 2, requires_grad=needs_gradient)
    out = layer(x)
    assert sleeper.slept_s == 5.0
    out.sum().backward()
    assert sleeper.slept_s == 15.0


def test_the_two_halves_of_a_backward_sleep_can_be_taken_apart() -> None:
    """What zero-bubble schedules do: first the gradient by the input, later that by the weights."""
    sleeper = CountingSleeper(forward_s=0.0, backward_s=2.0)
    layer = SleepingLayer(torch.nn.Conv2d(3, 4, 1), sleeper)
    x = torch.ones(1, 3, 2, 2, requires_grad=True)
    out = layer(x).sum()
    torch.autograd.grad(out, x, retain_graph=True)
    assert sleeper.slept_s == 1.0
    torch.autograd.grad(out, layer.body.weight)
    assert sleeper.slept_s == 2.0


def test_a_sleeping_layer_computes_what_its_body_computes() -> None:
    body = torch.nn.Linear(3, 2)
    layer = SleepingLayer(body, CountingSleeper(forward_s=1.0, backward_s=1.0))
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), body(x))
    layer(x).sum().backward()
    expected = torch.autograd.grad(body(x).sum(), list(body.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(body.parameters(), expected, strict=True) if p.grad is not None)
    assert all(parameter.grad is not None for parameter in body.parameters())


def test_every_builder_gets_the_same_weights_and_batches() -> None:
    one, other = (model_work("resnet8", image_size=8, global_batch=4) for _ in range(2))
    whole, part = one.build(0, len(one.layers)), other.build(2, 4)
    for a, b in zip(whole[2:4].parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.batch(NUM_BATCHES + 1)[0], other.batch(1)[0])
    assert not torch.equal(one.batch(0)[0], one.batch(1)[0])


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_one_process_sleeps_for_all_stages_at_any_number_of_micro_batches(micro_batches: int) -> None:
    work = sleeping_work(stages=3, global_batch=8, forward_s=1.0, backward_s=2.0)
    counter = CountingSleeper(forward_s=work.sleeper.means_s["forward"], backward_s=work.sleeper.means_s["backward"])
    work.sleeper.sleep = counter.sleep  # type: ignore[method-assign]
    seat = Seat(0, 1, micro_batches, (0, len(work.layers)), torch.device("cpu"))
    CONTESTANTS["one-process"].build(work, seat).step()
    assert counter.slept_s == pytest.approx(3 * (1.0 + 2.0))


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("quick", [False, True])
def test_every_entry_can_have_its_numbers_of_micro_batches(suite: str, quick: bool) -> None:
    chosen = cases.cases_of(suite, quick=quick, cores=2)
    assert chosen
    for case in chosen:
        batch = case.make_work().global_batch
        for entry in case.entries:
            least = CONTESTANTS[entry.contestant].least_micro_batches(entry.ranks)
            share = entry.ranks if entry.contestant == "ddp" else 1
            assert entry.micro_batches
            assert all(count >= least and batch % (count * share) == 0 for count in entry.micro_batches), entry


def test_names_of_cases_are_unique_and_at_least_twenty_steps_are_measured_where_a_step_is_short() -> None:
    for suite in SUITES:
        chosen = cases.cases_of(suite, quick=False, cores=2)
        assert len({case.name for case in chosen}) == len(chosen)
        assert all(case.blocks * case.steps >= 8 for case in chosen)


# ---- measuring ------------------------------------------------------------------------------------------------------


class FakeRunner:
    """Takes no time; counts its steps."""

    fill = 3

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.terms_s = {"data": 0.0}

    def step(self) -> float:
        self.calls.append("step")
        self.terms_s["data"] += 1.0
        return float(len(self.calls))

    def drain(self) -> None:
        self.calls.append("drain")


@pytest.fixture
def lone_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_block_fills_and_warms_up_before_it_counts_and_drains_behind(lone_group: Any) -> None:
    runner = FakeRunner()
    order = crew.Order(micro_batches=1, bounds=(0, 1), warmup=2, steps=4)
    work = model_work("resnet8", image_size=8, global_batch=2)
    window = crew.measure(runner, order, work=work, interface="lo")
    assert runner.calls == ["step"] * (3 + 2 + 4) + ["drain"]
    assert window.terms_s == {"data": 4.0}, "of the measured steps alone"
    assert window.loss == 9.0
    assert window.window_s > 0
    assert window.peak_memory_bytes > 2**20
    assert window.interface_bytes >= 0


def test_an_interface_that_is_not_there_is_named() -> None:
    with pytest.raises(RuntimeError, match="no network interface 'nothing'"):
        crew.interface_bytes("nothing")


def _fail() -> Any:
    raise ValueError("no such work")


def test_a_rank_that_fails_is_named_with_its_reason() -> None:
    team = crew.Team("one-process", 1, _fail)
    with crew.Crew(team) as one, pytest.raises(crew.CrewError, match=r"(?s)one-process, rank 0: .*no such work"):
        one.block(crew.Order(1, (0, 1), warmup=0, steps=1))


KILLED = """
import functools, sys, time
sys.path[:0] = sys.argv[1:]
import crew, work

if __name__ == "__main__":
    crew.preload()
    team = crew.Team("lock-step", 2, functools.partial(work.model_work, "resnet8", image_size=8, global_batch=4))
    with crew.Crew(team) as one:
        one.block(crew.Order(2, (0, 1), warmup=0, steps=1))
        print("ranks", *(process.pid for process in one._processes), flush=True)
        time.sleep(600)
"""


def test_ranks_that_wait_for_their_turn_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    command = [sys.executable, str(script), str(ROOT / "benchmarks"), str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        said = next(line.split() for line in benchmark.stdout if line.startswith("ranks"))
        benchmark.kill()
    ranks = [int(pid) for pid in said[1:]]
    assert len(ranks) == 2
    deadline = time.monotonic() + 20.0
    while any(process_exists(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(process_exists(pid) for pid in ranks)


# ---- lines and tables -----------------------------------------------------------------------------------------------


def window(window_s: float, *, cpu_s: float = 0.0, slept_s: float = 0.0, sent: int = 0) -> crew.Window:
    return crew.Window(window_s, cpu_s, slept_s, sent, peak_memory_bytes=100, loss=1.0, terms_s={"aux": 0.4})


class FakeOutlook:
    bounds = (0, 2, 4)

    def as_row(self) -> dict[str, Any]:
        return {"samples_per_s": 16.0, "idle_share": 0.25}


class FakeForecast:
    def __init__(self, work: Any) -> None:
        self.work = work


def line(work: Any, blocks: list[list[crew.Window]]) -> dict[str, Any]:
    entry = cases.Entry("dsaux-al", 2, (1,))
    case = cases.Case("sleep", "p=2, M=1", (entry,), work, steps=2, blocks=len(blocks))
    return duel.row_of(
        case,
        duel.Turn(entry, 1),
        blocks,
        link_mbit=None,
        outlook=FakeOutlook(),  # type: ignore[arg-type]
        work=FakeForecast(work()),  # type: ignore[arg-type]
        environment={},
    )


def test_a_line_has_median_and_range_of_the_blocks_and_per_rank_shares() -> None:
    work = functools.partial(sleeping_work, stages=2, global_batch=8, forward_s=0.0, backward_s=0.0)
    blocks = [[window(2.0, slept_s=1.0, sent=100), window(2.0, slept_s=2.0, sent=100)] for _ in range(2)]
    blocks.append([window(4.0, slept_s=1.0, sent=100), window(4.0, slept_s=2.0, sent=100)])
    row = line(work, blocks)
    assert (row["samples_per_s"], row["spread"]) == (8.0, [4.0, 8.0]), "8 samples, 2 steps a block of 2 or 4 s"
    assert row["busy_per_rank"] == [0.5, 1.0]
    assert row["idle_share"] == 0.25
    assert row["bytes_per_step"] == 50, "every rank reads the same counter"
    assert (row["n"], row["terms_s"]) == (3, [{"aux": 0.2}, {"aux": 0.2}])
    needed = "suite case contestant stages micro_batches global_batch samples_per_s idle_share bytes_per_step"
    assert set(f"{needed} peak_memory_bytes n spread environment".split()) <= set(row)
    json.dumps(row)


def test_a_computing_rank_is_busy_while_it_uses_its_core() -> None:
    work = functools.partial(model_work, "resnet8", image_size=8, global_batch=8)
    row = line(work, [[window(2.0, cpu_s=1.0), window(2.0, cpu_s=1.5)]])
    assert row["busy_per_rank"] == [0.5, 0.75]


ENVIRONMENT = {
    "cores": 2,
    "cpu": "a processor",
    "gpus": [],
    "versions": {"torch": "1", "deepspeed": "2", "dali": None},
    "started_utc": "2026-01-02T03:04:05+00:00",
}


def compute_row(contestant: str, speed: float, **changes: Any) -> dict[str, Any]:
    row = {
        "suite": "compute",
        "case": "net",
        "contestant": contestant,
        "ranks": 2,
        "threads": 1,
        "micro_batches": 1,
        "global_batch": 8,
        "link_mbit": None,
        "samples_per_s": speed,
        "spread": [speed - 1, speed + 1],
        "step_s": 8 / speed,
        "idle_share": 0.5,
        "bytes_per_step": 2_000_000,
        "peak_memory_bytes": 2**20,
        "n": 3,
        "steps": 2,
        "predicted": {"samples_per_s": 1.1 * speed, "idle_share": 0.4},
        "failed": None,
        "environment": ENVIRONMENT,
    }
    return {**row, **changes}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(duel_tables, "RESULTS", tmp_path)

    def write(suite: str, *rows: dict[str, Any]) -> None:
        for row in rows:
            seeds.append_line(tmp_path / f"{suite}.jsonl", row)

    return write


def test_each_contestant_is_shown_at_its_best_and_against_the_pipeline_at_its_best(results: Any) -> None:
    results(
        "compute",
        compute_row("one-process", 5.0, ranks=1),
        compute_row("deepspeed-1f1b", 4.0),
        compute_row("deepspeed-1f1b", 8.0, micro_batches=4),
        compute_row("dsaux-al", 1.0),
        compute_row("dsaux-al", 10.0),
        compute_row("torch-zbv", 9.0, failed="out of memory"),
    )
    rows = [row.split(" | ") for row in duel_tables.compute_best_table().splitlines()[2:5]]
    assert [row[1] for row in rows] == ["`one-process, 1 core`", "`deepspeed-1f1b`", "`dsaux-al`"], (
        "who failed is left out"
    )
    assert [row[2] for row in rows] == ["1", "4", "1"]
    assert rows[2][3:7] == ["10.0 (9.0 to 11.0)", "1.25", "2.50", "2.00"], "the newest line counts"
    assert rows[2][-1] == "11.0 (+10 %) |"


def test_the_link_table_compares_with_the_unshaped_step(results: Any) -> None:
    results(
        "network",
        compute_row("deepspeed-1f1b", 8.0, suite="network"),
        compute_row("deepspeed-1f1b", 2.0, suite="network", link_mbit=50.0),
        compute_row("dsaux-penalty", 8.0, suite="network"),
        compute_row("dsaux-penalty", 4.0, suite="network", link_mbit=50.0),
    )
    rows = [row.split(" | ") for row in duel_tables.network_table().splitlines()[2:6]]
    assert rows[3][1:3] == ["50", "`dsaux-penalty`"]
    assert rows[3][4:7] == ["2000", "2.00", "0.50"]


def test_predictions_are_counted_within_fifteen_per_cent(results: Any) -> None:
    results(
        "compute",
        compute_row("ddp", 10.0),
        compute_row("ddp", 10.0, micro_batches=2, predicted={"samples_per_s": 12.0}),
    )
    results("sleep", compute_row("ddp", 10.0, suite="sleep", predicted={"samples_per_s": None}))
    results("network", compute_row("ddp", 10.0, suite="network", predicted={"samples_per_s": None}))
    assert "| compute | `ddp` | 2 | 1.15 (1.10 to 1.20) | 1 of 2 | - | - |" in duel_tables.prediction_table()


def test_predictions_without_gauges_are_counted_beside_those_with_them(results: Any) -> None:
    results(
        "compute",
        compute_row("ddp", 10.0, predicted_once={"samples_per_s": 13.0}),
        compute_row("ddp", 10.0, micro_batches=2, predicted_once={"samples_per_s": 8.0}),
    )
    expected = "| compute | `ddp` | 2 | 1.10 (1.10 to 1.10) | 2 of 2 | 1.05 (0.80 to 1.30) | 0 of 2 |"
    assert expected in duel_tables.prediction_table()


def test_seconds_of_training_leave_evaluations_out() -> None:
    events = [
        {"event": "stages", "time_s": 5.0},
        {"event": "step", "time_s": 9.0},
        {"event": "eval", "time_s": 12.0, "seconds": 2.0},
        {"event": "eval", "time_s": 20.0, "seconds": 3.0},
    ]
    assert seeds.training_seconds(events) == [5.0, 10.0]
    row = {"eval_s": [5.0, 10.0], "evals": [[1, 0.7], [2, 0.9]]}
    assert accuracy.seconds_to(0.8, row) == 10.0
    assert accuracy.seconds_to(0.95, row) is None
