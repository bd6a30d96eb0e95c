"""Drawings of schedules: times from the simulation, text, SVG, trace, and the command that makes them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from dsaux.schedules.__main__ import main
from dsaux.schedules.draw import chrome_trace, comparison_svg, comparison_text, svg, text_grid
from dsaux.schedules.timeline import AUX, STEP, Timeline, simulate

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "schedules.svg"
SVG = "{http://www.w3.org/2000/svg}"


def one_f_one_b(stages: int = 4, micro_batches: int = 4, batches: int = 1) -> Timeline:
    return simulate("1f1b", num_stages=stages, micro_batches=micro_batches, num_batches=batches)


def penalty(stages: int = 4, micro_batches: int = 1, batches: int = 4, aux_share: float = 0.1) -> Timeline:
    return simulate("penalty", num_stages=stages, micro_batches=micro_batches, num_batches=batches, aux_share=aux_share)


def al(
    stages: int = 4, micro_batches: int = 1, batches: int = 4, aux_share: float = 0.1, overlap: bool = False
) -> Timeline:
    name = "al-overlap" if overlap else "al"
    return simulate(name, num_stages=stages, micro_batches=micro_batches, num_batches=batches, aux_share=aux_share)


# ---- times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 16])
def test_the_idle_share_of_1f1b_is_that_of_the_formula(stages: int, micro_batches: int) -> None:
    formula = (stages - 1) / (micro_batches + stages - 1)
    assert one_f_one_b(stages, micro_batches, batches=2).idle_share == pytest.approx(formula)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_penalty_never_waits_when_stages_are_equal(stages: int, micro_batches: int) -> None:
    timeline = penalty(stages, micro_batches)
    assert timeline.idle_share == pytest.approx(0.0, abs=1e-12)
    share = 0.1 if stages > 1 else 0.0  # one stage has no boundary and no AuxNet
    assert timeline.end == pytest.approx(4 * 3 * (1 + share))


def test_the_work_of_a_batch_is_the_same_but_for_the_aux_net() -> None:
    def work(timeline: Timeline) -> float:
        return sum(piece.end - piece.start for piece in timeline.pieces if piece.kind != AUX)

    assert work(one_f_one_b(batches=2)) == pytest.approx(work(penalty(batches=2)))
    assert work(one_f_one_b(batches=2)) == pytest.approx(work(al(batches=2)))


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("batches", [1, 2, 7])
def test_al_idles_in_fill_and_drain_alone(stages: int, micro_batches: int, batches: int) -> None:
    timeline = al(stages, micro_batches, batches)
    share = 0.1 if stages > 1 else 0.0
    assert timeline.end == pytest.approx((batches + stages - 1) * 3 * (1 + share))
    assert timeline.idle_share == pytest.approx((stages - 1) / (batches + stages - 1))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_filled_wavefront_has_a_batch_a_tick_and_no_idle_time(overlap: bool) -> None:
    timeline = al(4, 1, 12, overlap=overlap)
    assert timeline.period == pytest.approx(3.3)
    start, end = 4 * 3.3, 12 * 3.3
    busy = sum(max(0.0, min(piece.end, end) - max(piece.start, start)) for piece in timeline.pieces)
    assert busy == pytest.approx(4 * (end - start))


def test_the_idle_share_up_to_a_time_counts_what_lies_before_it() -> None:
    timeline = al(4, 1, 12)
    assert timeline.idle_share_until(3.3) == pytest.approx(3 / 4)
    assert timeline.idle_share_until(timeline.end) == timeline.idle_share


def test_a_message_leaves_behind_the_backward_pass_and_is_used_in_the_tick_after() -> None:
    timeline = al(3, 2, 4)
    ends = {(p.stage, p.batch): p.end for p in timeline.pieces if p.name == "LocalBackward"}
    uses = {(p.stage, p.batch): p.end for p in timeline.pieces if p.name == "LocalForward" and p.micro_batch == 0}
    assert len(timeline.flights) == 2 * 4
    for flight in timeline.flights:
        assert flight.receiver == flight.sender - 1
        assert flight.start == ends[flight.sender, flight.batch]
        assert flight.end == uses[flight.receiver, flight.batch]


TIMELINES = {"1f1b": one_f_one_b(batches=2), "penalty": penalty(), "al": al(), "al-overlap": al(overlap=True)}


@pytest.mark.parametrize("timeline", TIMELINES.values(), ids=TIMELINES)
def test_pieces_of_a_stage_follow_each_other(timeline: Timeline) -> None:
    for stage in range(timeline.num_stages):
        pieces = [piece for piece in timeline.pieces if piece.stage == stage]
        assert all(one.end <= other.start + 1e-12 for one, other in pairwise(pieces))
        assert sum(piece.kind == STEP for piece in pieces) == timeline.num_batches


def test_an_activation_is_there_only_after_the_stage_before_made_it() -> None:
    forward = {(p.stage, p.micro_batch): p for p in one_f_one_b().pieces if p.name == "ForwardPass"}
    assert all(
        forward[stage + 1, number].start >= forward[stage, number].end for stage in range(3) for number in range(4)
    )


# ---- text ----------------------------------------------------------------------------------------------


def test_1f1b_by_steps_looks_as_drawn() -> None:
    drawing = """
step      0   1   2   3   4   5
stage 0   F0  .   F1  B0  .   B1  |
stage 1   .   F0  B0  F1  B1  .   |
"""
    assert text_grid(one_f_one_b(2, 2)) == drawing.strip()


def test_comparison_by_time_looks_as_drawn() -> None:
    drawing = """
DeepSpeed 1F1B, 2 micro-batches: 33 % idle, a batch every 4.50
stage 0  F0--F1--........B0======....B1=====|
stage 1  ....F0--B0======F1--B1=====|........

dsaux penalty, whole batches: 0 % idle, a batch every 3.75
stage 0  aaF0------B0==============aaa|aaF1--
stage 1  aaF0------B0==============aaa|aaF1--
"""
    text = comparison_text(one_f_one_b(2, 2), penalty(2, batches=2, aux_share=0.25))
    assert text.splitlines()[:7] == drawing.strip().splitlines()


def test_comparison_with_a_wavefront_looks_as_drawn() -> None:
    drawing = """
DeepSpeed 1F1B, 2 micro-batches: 33 % idle, a batch every 4.50
stage 0  F0--F1--........B0======....B1=====|F0--F1--........B0======....B1=====|
stage 1  ....F0--B0======F1--B1=====|............F0--B0======F1--B1=====|........

dsaux augmented Lagrangian (al), whole batches: 21 % idle, a batch every 3.75 once filled
stage 0  ..............................aaF0------B0==============aaa|aaF1------B1
stage 1  aaF0------B0==============aaa|aaF1------B1==============aaa|aaF2------B2
"""
    text = comparison_text(one_f_one_b(2, 2, batches=2), al(2, batches=3, aux_share=0.25))
    assert text.splitlines()[:7] == drawing.strip().splitlines()


def test_a_wavefront_of_micro_batches_by_steps_looks_as_drawn() -> None:
    drawing = """
step      0    1      2    3      4    5      6    7
stage 0   .    .      .    .      FB0  FB1  | FB2  FB3  |
stage 1   .    .      FB0  FB1  | FB2  FB3  | .    .
stage 2   FB0  FB1  | FB2  FB3  | .    .      .    .
"""
    assert text_grid(al(3, 2, 2)) == drawing.strip()


def test_the_bar_of_a_step_does_not_hide_a_short_aux_net_pass() -> None:
    rows = comparison_text(one_f_one_b(batches=2), penalty(batches=4)).splitlines()
    assert rows[-5].count("a|") == 3


# ---- SVG and trace -------------------------------------------------------------------------------------


def test_the_figure_in_docs_is_what_the_command_makes(tmp_path: Path) -> None:
    out = tmp_path / "schedules.svg"
    assert main(["--compare", "--format", "svg", "--out", str(out)]) == 0
    assert out.read_text() == FIGURE.read_text(), (
        "run: python -m dsaux.schedules --compare --format svg --out docs/figures/schedules.svg"
    )


def test_a_comparison_has_a_mark_for_each_optimizer_step_and_the_simulated_idle_shares() -> None:
    above = one_f_one_b(stages=3, batches=2)
    root = ElementTree.fromstring(comparison_svg(above, penalty(3)))
    marks = [path for path in root.iter(f"{SVG}path") if path.get("class") == "step"]
    done = sum(piece.kind == STEP and piece.end <= above.end for piece in penalty(3).pieces)
    assert len(marks) == 3 * 2 + done
    words = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert f"DeepSpeed 1F1B, 4 micro-batches: {100 * above.idle_share:.0f} % idle" in words


@pytest.mark.parametrize("below", [penalty(batches=9), al(batches=9)], ids=["penalty", "al"])
def test_nothing_is_drawn_outside_the_picture(below: Timeline) -> None:
    root = ElementTree.fromstring(comparison_svg(one_f_one_b(batches=3), below))
    sides = [(float(box.get("x", "0")), float(box.get("width", "0"))) for box in root.iter(f"{SVG}rect")]
    assert all(x >= 0 and x + width <= 900 for x, width in sides)


def test_every_message_that_ends_within_the_axis_is_an_arrow() -> None:
    above, below = one_f_one_b(stages=3, batches=3), al(3, batches=9)
    root = ElementTree.fromstring(comparison_svg(above, below))
    arrows = [path for path in root.iter(f"{SVG}path") if path.get("class") == "message"]
    assert len(arrows) == sum(flight.end <= above.end for flight in below.flights) > 0


def test_a_comparison_gives_the_idle_share_of_what_it_shows_and_the_steady_rhythm() -> None:
    above, below = one_f_one_b(stages=4, batches=4), al(4, batches=7)
    root = ElementTree.fromstring(comparison_svg(above, below))
    words = [text.text or "" for text in root.iter(f"{SVG}text")]
    share = 100 * below.idle_share_until(above.end)
    assert f"dsaux augmented Lagrangian (al), whole batches: {share:.0f} % idle" in words
    assert "a batch every 3.30 once filled" in words


def test_one_schedule_has_a_picture_of_its_own() -> None:
    root = ElementTree.fromstring(svg(penalty(2)))
    assert next(root.iter(f"{SVG}text")).text == "2 stages, 4 batches"


def test_a_trace_holds_every_piece_with_its_time() -> None:
    timeline = one_f_one_b(2, 2)
    events = json.loads(chrome_trace(timeline))["traceEvents"]
    lasting = [event for event in events if event["ph"] == "X"]
    assert len(lasting) == 2 * 2 * 2
    assert max(event["ts"] + event["dur"] for event in lasting) == pytest.approx(1000 * timeline.end)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"stage 0", "stage 1"}


def test_a_trace_joins_the_ends_of_every_message() -> None:
    timeline = al(3)
    events = json.loads(chrome_trace(timeline))["traceEvents"]
    sends, uses = ([event for event in events if event["ph"] == phase] for phase in ("s", "f"))
    assert [event["id"] for event in sends] == [event["id"] for event in uses] == list(range(2 * 4))
    assert all(one["pid"] == other["pid"] + 1 for one, other in zip(sends, uses, strict=True))


# ---- command -------------------------------------------------------------------------------------------


def test_the_command_draws_the_penalty_ticks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schedule", "penalty", "--stages", "4", "--steps", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tick", "0", "1", "2", "3", "4", "5"]
    assert lines[4].split() == ["stage", "3", "FB0", "FB1", "FB2", "FB3", "FB4", "FB5"]


@pytest.mark.parametrize("name", ["al", "al-overlap"])
def test_the_command_draws_a_wavefront_with_fill_and_drain(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = """
tick      0     1     2     3     4     5     6     7     8
stage 0   .     .     .     FB0   FB1   FB2   FB3   FB4   FB5
stage 1   .     .     FB0   FB1   FB2   FB3   FB4   FB5   .
stage 2   .     FB0   FB1   FB2   FB3   FB4   FB5   .     .
stage 3   FB0   FB1   FB2   FB3   FB4   FB5   .     .     .
"""
    assert main(["--schedule", name, "--stages", "4", "--steps", "6"]) == 0
    assert capsys.readouterr().out.strip() == drawing.strip()


@pytest.mark.parametrize(("kind", "words"), [("svg", "augmented Lagrangian"), ("trace", "message 0")])
def test_the_command_writes_pictures_and_traces_of_a_wavefront(kind: str, words: str, tmp_path: Path) -> None:
    out = tmp_path / "al"
    assert main(["--schedule", "al", "--format", kind, "--out", str(out)]) == 0
    assert words in out.read_text()


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["al", "al-overlap"])
def test_a_comparison_shows_the_fill_and_then_as_long_a_steady_state(
    name: str, stages: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--compare", "--schedule", name, "--stages", str(stages)]) == 0
    above, below, _ = capsys.readouterr().out.split("\n\n")
    rows = [row[9:] for row in below.splitlines()[1:]]
    length = max(len(row) for row in above.splitlines()[1:]) - 9
    assert [len(row) for row in rows] == [length] * stages  # no stage has run out of batches
    fill = length - len(rows[0].lstrip("."))
    assert (fill > 0) == (stages > 1)
    assert fill <= length / 2


def test_a_comparison_with_penalty_remains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare", "--schedule", "penalty"]) == 0
    assert "dsaux penalty, whole batches: 0 % idle, a batch every 3.30\n" in capsys.readouterr().out


def test_the_command_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schedule", "1f1b", "--stages", "3", "--check"]) == 0
    assert capsys.readouterr().out.startswith("1f1b: stages 3, batches 4, micro-batches 3, buffers 3/2/2")


@pytest.mark.parametrize("name", ["al", "al-overlap", "penalty"])
def test_dsaux_takes_whole_batches_unless_told_otherwise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schedule", name, "--stages", "3", "--steps", "7", "--check"]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: stages 3, batches 7, micro-batches 1, buffers 1/1/1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--schedule", "zigzag"], "zigzag"),
        (["--schedule", "penalty", "--stages", "0"], "error: --stages is 0; it must be a whole number >= 1."),
        (["--schedule", "penalty", "--aux_share", "2"], "error: --aux_share is 2; it must be a number >= 0 and <= 1."),
        ([], "error: --schedule is missing. Give --schedule NAME, one of 1f1b, al, "),
        (["--compare", "--schedule", "1f1b"], "give --schedule al, al-overlap, local or penalty"),
        (["--compare", "--check"], "--compare draws text or svg"),
        (["--compare", "--format", "trace"], "--compare draws text or svg"),
        (["--schedule", "penalty", "--steps", "two"], "invalid int value: 'two'"),
    ],
)
def test_wrong_arguments_give_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_file_that_cannot_be_written_gives_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--schedule", "penalty", "--out", str(tmp_path / "no" / "where")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
