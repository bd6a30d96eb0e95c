"""The display as text: plain lines, and the panel at several widths."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from dsaux.display import RunDisplay
from dsaux.display_text import duration, figure, memory
from dsaux.metrics import EvalStats, FinalStats, StageRow, StepStats

ESCAPE = "\x1b"
STEP = StepStats(
    step=120,
    total_steps=460,
    epoch=3,
    epochs=10,
    loss=1.234,
    train_accuracy=0.512,
    boundary_mismatch=(0.021, 0.015),
    boundary_adjoint=(3.21, 0.987),
    stage_loss=(0.0123, 0.000456, 1.239),
    waited_ticks=(0.012, 0.345, 0.0678),
    samples_per_s=612.3,
    learning_rate=0.0912,
    peak_memory_bytes=(1_234_567_890, 2_345_678_901, 345_678_901),
    phase="penalty",
)
EXACT_STEP = replace(
    STEP, phase="1f1b", boundary_mismatch=(), boundary_adjoint=(), stage_loss=(None, None, 1.239), waited_ticks=()
)
EVALUATION = EvalStats(
    step=92, epoch=2, top1=0.4125, top5=0.9105, loss=1.502, samples=1800, seconds=3.21, method="penalty"
)
FINAL = FinalStats(
    method="penalty+1f1b",
    schedule="penalty",
    stages=3,
    replicas=2,
    epochs=10,
    exact_epochs=2,
    steps=460,
    test_accuracy=0.7654,
    test_top5=0.9321,
    test_loss=0.8765,
    test_samples=1800,
    train_samples_per_s=598.7,
    wall_s=754.2,
    wait_share=[0.0123, 0.1, 0.0],
    boundary_mismatch=[0.021, 0.34],
    boundary_adjoint=[3.21, 0.987],
    peak_memory_bytes=[1_234_567_890, 2_345_678_901, 345_678_901],
    seed=7,
    bounds=[0, 4, 7, 11],
    model="resnet20",
    data="photos",
)
FINAL_WORDS = [
    "1.2 % (stage 0), 10.0 % (stage 1), 0.0 % (stage 2)",
    "0.765 top-1",
    "0.932 top-5",
    "1,800 images",
    "0.876",
    "599 samples/s",
    "0:12:34",
    "0.021 (stages 0-1)",
    "high 0.340 (stages 1-2)",
    "1.15 GiB (stage 0)",
    "2.18 GiB (stage 1)",
    "330 MiB (stage 2)",
    "10 epochs (2 of them exact)",
    "460 steps",
    "penalty+1f1b",
    "seed 7",
]


def stage_rows(replicas: int = 1, hosts: int = 1) -> list[StageRow]:
    names = [("stem", "group1.block3"), ("group2.block1", "group2.block3"), ("head", "head")]
    return [
        StageRow(
            rank=rank,
            host=f"node{rank % hosts}",
            device=f"cuda:{rank}",
            replica=rank // 3,
            stage=rank % 3,
            first_layer=names[rank % 3][0],
            last_layer=names[rank % 3][1],
            parameters=1_234_567 + rank,
            share=(0.4, 0.35, 0.25)[rank % 3],
        )
        for rank in range(3 * replicas)
    ]


class Screen:
    """A display with a clock that the test sets, writing to memory."""

    def __init__(self, *, is_terminal: bool, width: int = 100) -> None:
        self.now = 0.0
        self.file = io.StringIO()
        self.console = Console(
            file=self.file,
            force_terminal=is_terminal,
            width=width,
            height=40,
            color_system="standard" if is_terminal else None,
            record=True,
            _environ={},
        )
        self.display = RunDisplay(
            name="quickstart",
            model="resnet20",
            schedule="penalty",
            stages=3,
            replicas=2,
            console=self.console,
            clock=lambda: self.now,
        )

    def frame(self) -> str:
        console = Console(file=io.StringIO(), width=self.console.width, record=True, _environ={})
        console.print(self.display.frame())
        return console.export_text()

    def written(self) -> str:
        return self.file.getvalue()


def show_a_run(screen: Screen) -> None:
    with screen.display as display:
        display.stages(stage_rows(replicas=2))
        display.step(replace(STEP, step=80, train_accuracy=None))
        display.evaluation(EVALUATION)
        screen.now += 10
        display.step(STEP)
        display.warning("the mismatch is large")
        display.message("exact back-propagation from step 400 on")
        display.step(replace(EXACT_STEP, step=440))
        display.final(FINAL, "runs/quickstart")


# ---- plain lines ----


def test_plain_lines_hold_no_escape_codes_and_no_character_beyond_ascii() -> None:
    screen = Screen(is_terminal=False)
    show_a_run(screen)
    assert ESCAPE not in screen.written()
    assert "\r" not in screen.written()
    assert screen.written().isascii()


def test_a_plain_step_is_one_line_with_its_figures_and_the_time_left() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(replace(STEP, step=80))
    screen.now += 10.0  # 40 steps in 10 s: 340 steps in 85 s
    screen.display.step(STEP)
    assert screen.written().splitlines() == [
        "epoch  3/10  step  80/460  loss 1.234  train 0.512  mismatch 0.021    612 samples/s  -:--:-- left",
        "epoch  3/10  step 120/460  loss 1.234  train 0.512  mismatch 0.021    612 samples/s  0:01:25 left",
    ]


def test_plain_lines_keep_their_columns_whatever_the_figures() -> None:
    screen = Screen(is_terminal=False)
    odd = {"train_accuracy": None, "loss": math.nan, "boundary_mismatch": (), "samples_per_s": 3.25}
    for stats in (STEP, EXACT_STEP, replace(STEP, loss=12.3456), replace(STEP, **odd)):
        screen.display.step(stats)
    lines = screen.written().splitlines()
    assert len({line.index(" samples/s") for line in lines}) == 1
    assert len({line.index("  train ") for line in lines}) == 1


def test_a_plain_line_is_not_wrapped_at_the_width_of_a_console() -> None:
    screen = Screen(is_terminal=False, width=40)
    screen.display.step(STEP)
    screen.display.warning("word " * 30)
    assert len(screen.written().splitlines()) == 2


def test_the_exact_phase_is_named_in_the_place_of_the_mismatch() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(EXACT_STEP)
    assert "exact (1f1b)" in screen.written()
    assert "mismatch" not in screen.written()


def test_a_plain_mismatch_is_the_largest_and_nan_is_not_hidden() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(replace(STEP, boundary_mismatch=(0.01, math.nan, 0.02)))
    assert "mismatch   nan" in screen.written()


def test_a_plain_evaluation_is_one_line() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(STEP)
    screen.display.evaluation(EVALUATION)
    assert screen.written().splitlines()[1] == (
        "epoch  2/10  test  top-1 0.412  top-5 0.910  loss 1.502  1,800 images in 3.2 s  (penalty)"
    )


def test_an_evaluation_without_training_names_no_epoch() -> None:
    screen = Screen(is_terminal=False)
    screen.display.evaluation(replace(EVALUATION, step=0, epoch=0))
    assert screen.written().startswith("test  top-1 0.412")


def test_the_plain_stage_map_has_a_line_for_each_rank() -> None:
    screen = Screen(is_terminal=False)
    screen.display.stages(stage_rows(replicas=2, hosts=2), unit="parameters")
    header, *lines = screen.written().splitlines()
    assert header.split("  ")[-1] == "% of parameters"
    assert len(lines) == 6
    assert lines[4].split() == (
        "4 node0 cuda:4 1 1 group2.block1 .. group2.block3 1,234,571 35.0".split()  # noqa: SIM905
    )
    assert lines[5].split() == ["5", "node1", "cuda:5", "1", "2", "head", "1,234,572", "25.0"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_result_shows_every_figure_and_the_run_folder(is_terminal: bool) -> None:
    screen = Screen(is_terminal=is_terminal)
    with screen.display as display:
        display.final(FINAL, "runs/quickstart")
    text = screen.console.export_text()
    for words in [*FINAL_WORDS, "runs/quickstart"]:
        assert words in text


def test_a_run_of_one_stage_shows_dashes_for_what_it_does_not_have() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(replace(STEP, boundary_mismatch=()))
    screen.display.final(replace(FINAL, boundary_mismatch=[], exact_epochs=0, stages=1, replicas=1), "runs/a")
    assert "mismatch     -" in screen.written()
    assert "1 stage x 1 replica\n" in screen.written()
    assert "10 epochs, 460 steps" in screen.written()


# ---- the panel ----


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_line_of_the_panel_is_longer_than_the_terminal_or_cut(width: int) -> None:
    screen = Screen(is_terminal=True, width=width)
    screen.display.stages(stage_rows(replicas=2))
    screen.display.step(replace(STEP, boundary_mismatch=(0.021, 0.34)))
    screen.display.evaluation(EVALUATION)
    text = screen.console.export_text(clear=False) + screen.frame()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert "…" not in screen.console.export_svg()
    assert "group2.block1 .. group2.block3" in text


def test_the_panel_shows_every_figure() -> None:
    screen = Screen(is_terminal=True)
    screen.display.stages(stage_rows())
    screen.display.evaluation(EVALUATION)
    screen.display.step(replace(STEP, step=80))
    screen.now += 10.0
    screen.display.step(STEP)
    frame = screen.frame()
    for words in [
        "quickstart",
        "resnet20, penalty, 3 stages x 2 replicas",
        "step 120/460",
        "epoch 3/10",
        "0:00:10 since start, 0:01:25 left",
        "1.234",
        "0.512",
        "0.412 (epoch 2)",
        "612",
        "0.0912",
    ]:
        assert words in frame
    lines = [line.strip("│ ").split() for line in frame.splitlines()]
    assert "0 stem .. group1.block3 0.0123 0.021 3.210 0.012 1.15 GiB".split() in lines  # noqa: SIM905
    assert "1 group2.block1 .. group2.block3 0.000456 0.015 0.987 0.345 2.18 GiB".split() in lines  # noqa: SIM905
    assert "2 head 1.24 - - 0.068 330 MiB".split() in lines  # noqa: SIM905


def test_a_large_mismatch_is_marked_by_a_word_in_the_panel() -> None:
    screen = Screen(is_terminal=True)
    screen.display.step(replace(STEP, boundary_mismatch=(0.021, 0.34)))
    assert "high 0.340" in screen.frame()
    assert "high 0.021" not in screen.frame()


def test_the_panel_names_the_exact_phase_and_shows_no_local_losses_in_it() -> None:
    screen = Screen(is_terminal=True)
    screen.display.stages(stage_rows())
    screen.display.step(EXACT_STEP)
    assert "exact (1f1b)" in screen.frame()
    lines = [line.strip("│ ").split() for line in screen.frame().splitlines()]
    assert "0 stem .. group1.block3 - - - - 1.15 GiB".split() in lines  # noqa: SIM905
    assert "2 head 1.24 - - - 330 MiB".split() in lines  # noqa: SIM905


def test_the_panel_before_the_first_step_has_its_name_and_clock() -> None:
    screen = Screen(is_terminal=True)
    screen.now += 65.0
    assert "quickstart" in screen.frame()
    assert "0:01:05 since start" in screen.frame()


def test_messages_and_warnings_are_printed_beside_the_panel() -> None:
    screen = Screen(is_terminal=True)
    show_a_run(screen)
    text = screen.console.export_text()
    assert "warning: the mismatch is large" in text
    assert "exact back-propagation from step 400 on" in text
    assert "test  top-1 0.412" in text


def _fail_in_a_step(screen: Screen) -> None:
    with screen.display:
        screen.display.step(STEP)
        raise RuntimeError("broken")


def test_an_error_stops_the_panel_and_leaves_the_cursor_visible() -> None:
    screen = Screen(is_terminal=True)
    with pytest.raises(RuntimeError, match="broken"):
        _fail_in_a_step(screen)
    written = screen.written()
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0
    assert written.removesuffix("\x1b[?25h").endswith("\n")
    screen.display.message("after")
    assert screen.written().endswith("after\n")


def test_the_panel_does_not_open_before_the_ranks_stand() -> None:
    screen = Screen(is_terminal=True)
    with screen.display:
        assert "\x1b" not in screen.written(), "nothing that other output could tear"
        screen.display.stages(stage_rows(replicas=1))
        assert "\x1b" in screen.written()


def test_a_process_that_is_ended_by_a_signal_leaves_the_cursor_visible() -> None:
    screen = Screen(is_terminal=True)
    with screen.display:
        screen.display.stages(stage_rows(replicas=1))
        written = screen.written()
        assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0


def test_brackets_in_a_message_are_text_and_not_markup() -> None:
    for is_terminal in (True, False):
        screen = Screen(is_terminal=is_terminal)
        screen.display.message("[red]rank[0][/red]")
        assert "[red]rank[0][/red]" in screen.console.export_text()


def test_output_that_is_no_terminal_stays_plain_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunDisplay(name="a", model="resnet8", schedule="penalty", stages=1, replicas=1) as display:
        display.step(STEP)
    text = capsys.readouterr().out
    assert text.startswith("a: resnet8, penalty, 1 stage x 1 replica\nepoch  3/10")
    assert ESCAPE not in text


def test_a_terminal_without_cursor_control_gets_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    settings: dict[str, Any] = {
        "name": "a",
        "model": "resnet8",
        "schedule": "1f1b",
        "stages": 1,
        "replicas": 1,
    }
    with RunDisplay(**settings, console=console) as display:
        display.step(STEP)
    assert ESCAPE not in console.file.getvalue()  # type: ignore[attr-defined]


# ---- words ----


def test_the_time_left_is_measured_anew_in_the_exact_phase() -> None:
    screen = Screen(is_terminal=False)
    for step, phase, now in [
        (100, "penalty", 0),
        (200, "penalty", 100),
        (300, "1f1b", 200),
        (310, "1f1b", 300),
    ]:
        screen.now = now
        screen.display.step(replace(STEP, step=step, phase=phase))
    ends = [line.split()[-2] for line in screen.written().splitlines()]
    assert ends == ["-:--:--", "0:04:20", "-:--:--", "0:25:00"]


def test_the_last_step_has_no_time_left() -> None:
    screen = Screen(is_terminal=False)
    screen.display.step(replace(STEP, step=460))
    assert screen.written().endswith("0:00:00 left\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (100_000, "27:46:40")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MiB"), (5 * 2**20, "5 MiB"), (2**30, "1.00 GiB"), (80 * 2**30, "80.00 GiB")]
)
def test_memory_sizes(size: int, text: str) -> None:
    assert memory(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.2344, "1.234"), (9.99951, "10.00"), (12.345, "12.35"), (123.45, "123.5"), (math.inf, "inf")],
)
def test_figures_take_five_characters_where_they_can(value: float, text: str) -> None:
    assert figure(value) == text
