"""The command: what it advises for known times, and that it goes from a configuration to an answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dsaux.command import run
from dsaux.config import Config, ConfigError, load_config
from dsaux.plan import Plan, main, make_plan, measure_config, to_json
from dsaux.plan_advice import AS_FAST, WORTH, advise
from dsaux.plan_show import show_plan, size_words
from dsaux.planner import CONTESTANTS, LayerTimes, Prediction, SegmentCost, Workload, parse_link

CONFIG = Path(__file__).parents[2] / "ds_configs" / "quickstart.json"
NVLINK, ETHERNET = parse_link("200GB/s", latency_s=1e-5), parse_link("1000Mbit/s", latency_s=1e-4)


def config_of(batch: int) -> Config:
    return load_config(CONFIG, overrides=[f"train_batch_size={batch}"])


def like_resnet50() -> Workload:
    """18 equal layers with ResNet-50's parameters (102 MB) and 0.6 ms a sample; the AuxNet takes a tenth of a layer."""
    layers = 18

    def segment_cost(source: int | None, target: int, size: int) -> SegmentCost:
        return SegmentCost(1e-6 * size, 2e-6 * size, parameter_bytes=10**5)

    return Workload(
        layer_names=tuple(f"layer{index}" for index in range(layers)),
        times={1: (LayerTimes(1.1e-5, 2.2e-5),) * layers},
        update_s=(5e-5,) * layers,
        parameter_bytes=(102 * 10**6 // layers,) * layers,
        activation_bytes=(1_600_000,) * layers,
        kept_bytes=(5_000_000,) * layers,
        segment_cost=segment_cost,
        device="a device of this test",
    )


def prediction(contestant: str, samples_per_s: float, **changes: object) -> Prediction:
    values = {
        "contestant": contestant,
        "stages": 2,
        "replicas": 1,
        "micro_batches": 4,
        "global_batch": 8,
        "step_s": 8 / samples_per_s,
        "samples_per_s": samples_per_s,
        "idle_share": 0.25,
        "bytes_per_step": 1000,
        "memory_bytes": 1000,
        "bounds": (0, 1, 2),
        "aux_share": 0.0,
        "longest_stage_s": 1.0,
    }
    return Prediction(**{**values, **changes})  # type: ignore[arg-type]


def test_ddp_is_advised_where_links_are_fast_and_the_batch_is_large() -> None:
    plan = make_plan(config_of(1024), like_resnet50(), devices=8, link=NVLINK)
    assert plan.advice.prediction is not None
    assert plan.advice.prediction.contestant == "ddp"
    assert plan.advice.text.startswith("Use DDP on 8 devices")
    assert plan.best[0].contestant == "ddp"


def test_dsaux_is_advised_where_links_are_slow_and_the_batch_is_small() -> None:
    plan = make_plan(config_of(64), like_resnet50(), devices=8, link=ETHERNET)
    assert plan.advice.prediction is not None
    assert plan.advice.prediction.contestant.startswith("dsaux-")
    assert "times the best exact way" in plan.advice.text
    assert "It is not exact" in plan.advice.text


def test_one_process_is_advised_where_others_only_wait() -> None:
    plan = make_plan(config_of(4), like_resnet50(), devices=2, link=parse_link("10kB/s", latency_s=1.0))
    assert plan.advice.prediction is not None
    assert plan.advice.prediction.contestant == "one-process"
    assert "waiting for each other" in plan.advice.text


def test_what_does_not_fit_is_shown_last_and_never_advised() -> None:
    free = make_plan(config_of(1024), like_resnet50(), devices=8, link=NVLINK)
    limit = min(its.memory_bytes for its in free.predictions if its.contestant == "ddp") - 1
    plan = make_plan(config_of(1024), like_resnet50(), devices=8, link=NVLINK, memory_bytes=limit)
    assert plan.advice.prediction is not None
    assert plan.advice.prediction.contestant != "ddp"
    fits = [plan.fits(its) for its in plan.best]
    assert fits == sorted(fits, reverse=True)
    assert not all(fits)
    assert "(too much)" in shown(plan)
    nothing = make_plan(config_of(1024), like_resnet50(), devices=8, link=NVLINK, memory_bytes=1)
    assert nothing.advice.prediction is None
    assert nothing.advice.text.startswith("Nothing fits")


@pytest.mark.parametrize(
    ("rates", "advised"),
    [
        ({"ddp": 100, "torch-zbv": 100 / AS_FAST - 1e-6}, "ddp"),
        ({"ddp": 100, "torch-zbv": 100 / AS_FAST + 1e-6}, "torch-zbv"),
        ({"ddp": 100, "dsaux-al": 100 * WORTH - 1e-6}, "ddp"),
        ({"ddp": 100, "dsaux-al": 100 * WORTH + 1e-6}, "dsaux-al"),
        ({"ddp": 100, "dsaux-al": 200, "dsaux-penalty": 200 / AS_FAST - 1e-6}, "dsaux-al"),
        ({"ddp": 100, "dsaux-al": 150, "dsaux-penalty": 200}, "dsaux-penalty"),
        ({"dsaux-al": 1}, "dsaux-al"),
    ],
)
def test_simple_and_exact_ways_are_advised_unless_others_are_worth_it(rates: dict[str, float], advised: str) -> None:
    advice = advise([prediction(name, rate) for name, rate in rates.items()], devices=2)
    assert advice.prediction is not None
    assert advice.prediction.contestant == advised


def test_the_break_even_share_is_said_with_what_the_auxnet_takes() -> None:
    slow = make_plan(config_of(64), like_resnet50(), devices=8, link=ETHERNET)
    assert slow.break_even is not None
    assert slow.break_even > 0 or "of no cost" in shown(slow)
    fast = make_plan(config_of(1024), like_resnet50(), devices=8, link=NVLINK)
    assert fast.break_even is not None
    assert fast.break_even < 0.01  # DDP hides its sums there
    assert "break-even" in shown(fast)


def shown(plan: Plan, *, every: bool = False) -> str:
    out = io.StringIO()
    show_plan(plan, every=every, out=Console(file=out, width=300))
    return out.getvalue()


def test_the_table_says_what_was_assumed_and_measured() -> None:
    plan = make_plan(config_of(64), like_resnet50(), devices=4, link=ETHERNET)
    text = shown(plan)
    for words in ("a prediction", "a device of this test", "125 MB/s", "assumed, not measured", *CONTESTANTS[:2]):
        assert words in text
    assert "dsaux-local" not in text  # nobody has said what its heads cost
    assert len(shown(plan, every=True).splitlines()) > len(text.splitlines())


def test_the_table_names_what_the_configuration_asks_for_and_the_prediction_leaves_out() -> None:
    config = load_config(CONFIG, overrides=["train_batch_size=64", 'bf16={"enabled": true}'])
    plan = make_plan(config, like_resnet50(), devices=4, link=ETHERNET)
    assert "without the configuration's bf16" in shown(plan)
    assert "without the configuration's" not in shown(make_plan(config_of(64), like_resnet50(), devices=4, link=NVLINK))


def test_json_holds_all_predictions_and_the_advice() -> None:
    plan = make_plan(config_of(64), like_resnet50(), devices=4, link=ETHERNET)
    document = json.loads(json.dumps(to_json(plan)))
    assert len(document["predictions"]) == len(plan.predictions)
    advised = document["predictions"][document["advice"]["prediction"]]
    assert plan.advice.prediction is not None
    assert advised["contestant"] == plan.advice.prediction.contestant
    assert document["memory_bytes"] is None
    assert all(its["fits"] for its in document["predictions"])


def test_a_batch_that_nobody_can_share_is_refused() -> None:
    workload = like_resnet50()
    with pytest.raises(ConfigError, match="train_batch_size is 1, which cannot be shared by 8 devices"):
        make_plan(config_of(1), workload, devices=8, link=NVLINK)


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (125e6, "125 MB"), (2.5e12, "2.5 TB")])
def test_sizes_are_said_as_links_count_them(size: float, words: str) -> None:
    assert size_words(size) == words


def test_the_command_goes_from_a_configuration_to_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsaux.partition.WARMUP_RUNS", 0)
    monkeypatch.setattr("dsaux.partition.TIMED_RUNS", 1)
    times = tmp_path / "times.json"
    common = ["--ds_config", str(CONFIG), "--gpus", "2", "--set", "train_batch_size=8"]
    assert run(main, [*common, "--save_times", str(times), "--link", "1GB/s"]) == 0
    text = capsys.readouterr().out
    assert "resnet20 on photos, global batch 8, 2 devices" in text
    assert "Use " in text
    assert run(main, [*common, "--times", str(times), "--link", "1GB/s", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    # what the file holds is what was measured: the same table again
    for name, index in document["best"].items():
        rate = document["predictions"][index]["samples_per_s"]
        assert name in text
        assert f"{rate:.0f}" in text or f"{rate:.1f}" in text
    with pytest.raises(ConfigError, match=r'holds times of "resnet20", but dsaux\.model\.name is "resnet32"'):
        main([*common, "--times", str(times), "--set", "dsaux.model.name=resnet32"])


@pytest.mark.parametrize(
    "stages",
    [
        '{"type": "AdamW", "params": {"lr": 0.001}}',
        '{"type": "Lamb", "params": {"lr": 0.001}}',  # no twin in torch.optim: two moments, as --dry_run has it
    ],
)
def test_the_network_is_charged_with_the_stages_optimizer_and_the_auxnet_with_its_own(
    stages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsaux.partition.WARMUP_RUNS", 0)
    monkeypatch.setattr("dsaux.partition.TIMED_RUNS", 1)
    aux = 'dsaux.aux.optimizer={"type": "SGD", "params": {"lr": 0.05}}'
    config = load_config(CONFIG, overrides=[f"optimizer={stages}", aux])
    seconds = {"AdamW": 2.0, "SGD": 1.0}
    monkeypatch.setattr("dsaux.plan_measure._Meter.update_s_per_byte", lambda self, optimizer: seconds[optimizer[0]])
    workload = measure_config(config, devices=1, say=lambda _: None)
    assert workload.states_per_parameter == 2
    assert workload.aux_states_per_parameter == 0
    assert workload.update_s == tuple(2.0 * size for size in workload.parameter_bytes)
    segment, head = workload.segment(None, 1, 2), workload.head(1, 2)
    assert segment.update_s == 1.0 * segment.parameter_bytes
    assert head.update_s == 2.0 * head.parameter_bytes, "a local head is trained with its stage"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_is_being_timed_is_said_beside_the_answer(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsaux.partition.WARMUP_RUNS", 0)
    monkeypatch.setattr("dsaux.partition.TIMED_RUNS", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert run(main, ["--ds_config", str(CONFIG), "--gpus", "2", "--set", "train_batch_size=8", "--json"]) == 0
    said = capsys.readouterr()
    json.loads(said.out)
    for part in ("timing the optimizer", "timing layers, 4 samples", "timing AuxNet segments, 4 samples"):
        assert part in said.err
        assert is_terminal or said.err.splitlines().count(part) == 1
    assert ("\x1b[2K" in said.err) == is_terminal, "a line of a terminal is written over, one of a file is not"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "2", "--link", "fast"], "is no speed"),
        (["--gpus", "2", "--memory", "much"], "is no size"),
        (["--gpus", "2", "--times", "/nowhere/times.json"], "cannot be read"),
        (["--gpus", "2", "--latency_us", "-1"], "--latency_us is -1"),
        (
            ["--gpus", "2", "--set", "train_batch_size=null", "--set", "train_micro_batch_size_per_gpu=8"],
            "train_batch_size is missing",
        ),
        (["--gpus", "2", "--colour"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, ["--ds_config", str(CONFIG), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert len(captured.err.strip().splitlines()) == 1
