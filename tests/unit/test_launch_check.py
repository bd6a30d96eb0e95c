"""A configuration meets the processes, the model's layers and the data: batch sizes, cuts, and DeepSpeed's document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsaux.config import Config, ConfigError, check_launch, config_from_dict, load_config, resolved_deepspeed
from dsaux.launch_check import partition_indices
from tests.bad_input import REMOVE, good_config

ROOT = Path(__file__).resolve().parent.parent.parent
NET_WITHOUT_BATCHNORM = """
from torch import nn

def net(num_classes, input_spec):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), head)

def segment(source, target, *, depth, width, first):
    return nn.Conv2d(source.shape[0], target.shape[0], 3, padding=1)

def normed(source, target, **options):
    return nn.Sequential(segment(source, target, **options), nn.BatchNorm2d(target.shape[0]))
"""
NAMES = ["stem", "group1.block1", "group2.block1", "group3.block1", "head"]


def _config(sets: dict[str, Any] | None = None) -> Config:
    return config_from_dict(good_config(sets))


def _sizes(train: int | None, micro: int | None, steps: int | None, **more: Any) -> dict[str, Any]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {**dict(zip(keys, (train, micro, steps), strict=True)), "dsaux.data.train_samples": 10_000, **more}


@pytest.mark.parametrize(
    ("stages", "world_size", "replicas"), [(1, 1, 1), (1, 4, 4), (2, 2, 1), (2, 6, 3), (3, 3, 1), (5, 5, 1)]
)
def test_stages_times_replicas_are_the_processes(stages: int, world_size: int, replicas: int) -> None:
    sets = _sizes(None, 8, None, **{"dsaux.pipeline.stages": stages})
    launch = check_launch(_config(sets), world_size=world_size)
    assert (launch.world_size, launch.stages, launch.replicas) == (world_size, stages, replicas)
    assert launch.train_batch_size == 8 * replicas


@pytest.mark.parametrize(
    ("stages", "world_size", "says"),
    [
        (
            3,
            8,
            "dsaux.pipeline.stages is 3 but 8 processes were started; it must divide them. Start 3, 6 or 9,",
        ),
        (2, 1, "dsaux.pipeline.stages is 2 but 1 process was started; it must divide them. Start 2, 4 or 6,"),
        (4, 2, "Start 4, 8 or 12, or change stages."),
        (2, 7, "Start 4, 6 or 8, or change stages."),
        (2, 0, "but 0 processes were started"),
    ],
)
def test_stages_that_do_not_divide_the_processes_are_refused(stages: int, world_size: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launch(_config({"dsaux.pipeline.stages": stages}), world_size=world_size)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("given", "replicas", "found"),
    [
        ((64, None, None), 1, (64, 64, 1)),
        ((64, None, None), 2, (64, 32, 1)),
        ((64, None, 4), 2, (64, 8, 4)),
        ((64, 8, None), 2, (64, 8, 4)),
        ((64, 8, 4), 2, (64, 8, 4)),
        ((None, 8, None), 3, (24, 8, 1)),
        ((None, 8, 4), 3, (96, 8, 4)),
    ],
)
def test_missing_batch_sizes_follow_deepspeeds_rules(
    given: tuple[int | None, int | None, int | None], replicas: int, found: tuple[int, int, int]
) -> None:
    launch = check_launch(_config(_sizes(*given)), world_size=2 * replicas)
    sizes = (launch.train_batch_size, launch.micro_batch_size, launch.gradient_accumulation_steps)
    assert sizes == found


@pytest.mark.parametrize(
    ("given", "replicas", "says"),
    [
        (
            (64, None, None),
            3,
            "gradient_accumulation_steps x replicas = 1 x 3 = 3. Set train_batch_size to 63 or 66",
        ),
        (
            (64, None, 3),
            2,
            "gradient_accumulation_steps x replicas = 3 x 2 = 6. Set train_batch_size to 60 or 66",
        ),
        ((64, 12, None), 2, "train_micro_batch_size_per_gpu x replicas = 12 x 2 = 24"),
        ((4, 8, None), 1, "Set train_batch_size to 8, or change"),
        ((64, 8, 4), 1, "8 x 4 x 1 = 32. Set train_batch_size to 32"),
        ((2, None, None), 2, "BatchNorm needs at least 2. Set train_batch_size to 4 or more"),
        ((8, None, 8), 1, "BatchNorm needs at least 2. Set train_batch_size to 16 or more"),
        ((None, 1, None), 1, "BatchNorm needs at least 2"),
        ((20_000, None, None), 1, "dsaux.data.train_samples is 10000, less than one global batch of 20000"),
        ((None, 4000, 2), 2, "less than one global batch of 16000"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(
    given: tuple[int | None, int | None, int | None], replicas: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launch(_config(_sizes(*given)), world_size=2 * replicas)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        (2, None, None),
        (16, None, 8),
        (None, 1, None),
        (None, 1, 3),
        (16, 1, None),
        (18, 1, None),  # 9 steps; two samples on each of the 2 replicas do not divide it
        (12, 1, 6),
    ],
)
def test_who_follows_the_mend_for_a_micro_batch_of_one_sample_can_start(
    given: tuple[int | None, int | None, int | None],
) -> None:
    sets = _sizes(*given)
    with pytest.raises(ConfigError, match="BatchNorm needs at least 2") as caught:
        check_launch(_config(sets), world_size=4)
    mend = dict(re.findall(r"(\w+) to (\d+)", str(caught.value).partition(" Set ")[2]))
    assert mend
    for key, value in mend.items():
        assert sets[key] is not None, "a key that was not given"
        sets[key] = int(value)
    assert check_launch(_config(sets), world_size=4).micro_batch_size == 2


@pytest.mark.parametrize("schedule", ["penalty", "local", "1f1b"])
@pytest.mark.parametrize("name", ["vit_photos", "gpt_text"])
def test_a_network_without_batchnorm_takes_single_samples(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sets = ["train_batch_size=null", "train_micro_batch_size_per_gpu=1", f"dsaux.pipeline.schedule={schedule}"]
    config = load_config(f"ds_configs/{name}.json", overrides=sets)
    assert check_launch(config, world_size=config.dsaux.pipeline.stages).micro_batch_size == 1


@pytest.mark.parametrize(
    ("schedule", "segment", "part"),
    [
        ("penalty", "light", "the AuxNet's BatchNorm needs at least 2"),
        ("penalty", "my_net.py:segment", None),
        ("penalty", "my_net.py:normed", "the AuxNet's BatchNorm needs at least 2"),
        ("local", "light", "the local heads' BatchNorm needs at least 2"),
        ("1f1b", "light", None),
    ],
)
def test_batchnorm_may_be_in_what_dsaux_adds_to_a_network(
    schedule: str, segment: str, part: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_net.py").write_text(NET_WITHOUT_BATCHNORM)
    sets = {"dsaux.model.name": "my_net.py:net", "dsaux.aux.segment": segment, "dsaux.pipeline.schedule": schedule}
    config = _config(_sizes(None, 1, None, **sets))
    if part is None:
        assert check_launch(config, world_size=2).micro_batch_size == 1
    else:
        with pytest.raises(ConfigError, match=f"{part}. Set train_micro_batch_size_per_gpu to 2"):
            check_launch(config, world_size=2)


# 10 epochs of 4 steps, of which the last 3 are exact: they begin after step 28
@pytest.mark.parametrize(("max_steps", "fits"), [(None, True), (29, True), (1000, True), (28, False), (1, False)])
def test_run_must_reach_its_exact_epochs(max_steps: int | None, fits: bool) -> None:
    config = _config({"dsaux.run.epochs": 10, "dsaux.run.exact_epochs": 3, "dsaux.run.max_steps": max_steps})
    if fits:
        check_launch(config, world_size=2)
    else:
        with pytest.raises(ConfigError, match="begin after step 28"):
            check_launch(config, world_size=2)


def test_monitor_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config({"wandb": {"enabled": True}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ConfigError, match=r"wandb\.enabled is true but the package wandb is not installed"):
        check_launch(config, world_size=2)


def test_monitor_that_is_off_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config({"wandb": {"enabled": False}, "tensorboard": {}, "csv_monitor": {"enabled": True}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_launch(config, world_size=2)


# 2 epochs of 4 steps
@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"warmup_num_steps": 9}, "warmup_num_steps is 9 but with"),
        ({}, "warmup_num_steps is missing and 1000 by default but with"),
    ],
)
def test_warmup_longer_than_the_run_is_refused(params: dict[str, Any], says: str) -> None:
    check_launch(_config({"scheduler.params": {"total_num_steps": "auto", "warmup_num_steps": 8}}), world_size=2)
    with pytest.raises(ConfigError, match=f"{says} .* the run's 8 steps"):
        check_launch(_config({"scheduler.params": {"total_num_steps": "auto", **params}}), world_size=2)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ({"dsaux.pipeline.schedule": "1f1b"}, 'with dsaux.pipeline.schedule "1f1b"'),
        ({"dsaux.run.exact_epochs": 1}, "with dsaux.run.exact_epochs 1"),
        ({"dsaux.pipeline.schedule": "al", "dsaux.run.exact_epochs": 1}, "or change dsaux.run.exact_epochs."),
    ],
)
def test_timers_of_deepspeed_are_refused_where_they_stop_the_run(sets: dict[str, Any], says: str) -> None:
    config = _config({"wall_clock_breakdown": True, **sets})
    with pytest.raises(ConfigError) as caught:
        check_launch(config, world_size=2)
    assert str(caught.value).startswith("wall_clock_breakdown is true")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "sets",
    [
        {"dsaux.pipeline.schedule": "al"},
        {"dsaux.pipeline.schedule": "1f1b", "wall_clock_breakdown": False},
        {"dsaux.pipeline.schedule": "1f1b", "dsaux.pipeline.stages": 1},
    ],
)
def test_timers_of_deepspeed_are_let_through_elsewhere(sets: dict[str, Any]) -> None:
    check_launch(_config({"wall_clock_breakdown": True, **sets}), world_size=2)


@pytest.mark.parametrize(("device", "fits"), [("cpu", False), ("cuda", True)])
@pytest.mark.parametrize("name", ["Lamb", "lion"])
def test_optimizer_for_gpus_alone_needs_one(
    name: str, device: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(device_name=lambda: device)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: found)
    config = _config({"optimizer": {"type": name, "params": {"lr": 0.1}}, "dsaux.aux.optimizer": {"type": "SGD"}})
    if fits:
        check_launch(config, world_size=2)
    else:
        with pytest.raises(ConfigError, match=f'optimizer.type is "{name}", which DeepSpeed has for GPUs alone'):
            check_launch(config, world_size=2)


# ---- cuts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("partition", "stages", "indices"),
    [
        ([], 1, ()),
        ([2], 2, (2,)),
        ([1, 4], 3, (1, 4)),
        (["group2.block1"], 2, (2,)),
        (["group1.block1", 3, "head"], 4, (1, 3, 4)),
        ((1, 2, 3, 4), 5, (1, 2, 3, 4)),
    ],
)
def test_cuts_by_index_and_name(partition: Any, stages: int, indices: tuple[int, ...]) -> None:
    assert partition_indices(partition, names=NAMES, stages=stages) == indices


@pytest.mark.parametrize(
    ("partition", "stages", "says"),
    [
        ([2], 3, "has 1 entry but dsaux.pipeline.stages is 3; it must have 2"),
        ([1, 2], 2, "has 2 entries"),
        ([2, 2], 3, "they must increase"),
        ([3, 1], 3, "they must increase"),
        (["head", 1], 3, "they must increase"),
        ([0], 2, "1 .. 4 (group1.block1 .. head)"),
        (["stem"], 2, "must start at a layer in 1 .. 4"),
        ([-1], 2, "must start at a layer in 1 .. 4"),
        ([5], 2, "must start at a layer in 1 .. 4"),
        (["group1.blok1"], 2, "Did you mean group1.block1?"),
        ([True], 2, "a layer's index or name"),
        ([1.0], 2, "a layer's index or name"),
        ([None], 2, "a layer's index or name"),
        ([[1]], 2, "a layer's index or name"),
    ],
)
def test_wrong_cuts_are_refused(partition: Any, stages: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        partition_indices(partition, names=NAMES, stages=stages)
    assert says in str(caught.value)


@pytest.mark.parametrize("partition", ["uniform", "parameters", "time", [1], ["head"]])
def test_every_form_of_partition_is_let_through(partition: Any) -> None:
    check_launch(_config({"dsaux.pipeline.partition": partition}), world_size=2)


@pytest.mark.parametrize("partition", [None, 2, 1.5, True, {"at": 2}, "", "Time"])
def test_other_forms_of_partition_are_refused(partition: Any) -> None:
    with pytest.raises(ConfigError, match=r"dsaux\.pipeline\.partition is .* list of layers"):
        _config({"dsaux.pipeline.partition": partition})


def test_as_many_stages_as_layers_are_allowed_and_one_more_is_not() -> None:
    check_launch(_config({"dsaux.pipeline.stages": 5}), world_size=5)
    with pytest.raises(ConfigError, match=r"resnet8 has 5 layers.* Set stages to 5 or less"):
        check_launch(_config({"dsaux.pipeline.stages": 6}), world_size=6)


# ---- DeepSpeed's document ----------------------------------------------------------------------------------


def test_document_for_deepspeed_is_filled_in() -> None:
    config = _config({"gradient_accumulation_steps": 2})
    launch = check_launch(config, world_size=4)
    document = resolved_deepspeed(config, launch, total_steps=77)
    assert document["train_batch_size"] == 32
    assert document["train_micro_batch_size_per_gpu"] == 8
    assert document["gradient_accumulation_steps"] == 2
    assert document["scheduler"]["params"]["total_num_steps"] == 77
    assert document["dsaux"] == config.to_dict()["dsaux"]
    assert config.deepspeed["scheduler"]["params"]["total_num_steps"] == "auto", "the configuration was changed"


def test_document_for_deepspeed_is_a_configuration_again() -> None:
    config = _config()
    document = resolved_deepspeed(config, check_launch(config, world_size=2), total_steps=77)
    assert config_from_dict(json.loads(json.dumps(document))).dsaux == config.dsaux


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ({}, 10**9),
        ({"steps_per_print": None}, 10**9),
        ({"steps_per_print": 7}, 7),
        ({"wall_clock_breakdown": True, "dsaux.run.log_every": 3}, 3),
        ({"wall_clock_breakdown": True, "steps_per_print": 7}, 7),
    ],
)
def test_deepspeed_prints_only_when_asked(sets: dict[str, Any], expected: int) -> None:
    config = _config(sets)
    document = resolved_deepspeed(config, check_launch(config, world_size=2), total_steps=5)
    assert document["steps_per_print"] == expected


@pytest.mark.parametrize("sets", [{"scheduler": REMOVE}, {"scheduler.params.total_num_steps": 9}])
def test_number_of_steps_is_filled_in_only_for_auto(sets: dict[str, Any]) -> None:
    config = _config(sets)
    document = resolved_deepspeed(config, check_launch(config, world_size=2), total_steps=5)
    assert document.get("scheduler") == config.deepspeed.get("scheduler")


def test_run_without_steps_is_refused() -> None:
    config = _config()
    with pytest.raises(ValueError, match="at least one step"):
        resolved_deepspeed(config, check_launch(config, world_size=2), total_steps=0)


@pytest.mark.parametrize("key", ["output_path", "job_name"])
def test_a_monitors_folder_must_have_a_name_that_file_systems_can_hold(key: str) -> None:
    config = _config({f"csv_monitor.{key}": "x" * 300})
    with pytest.raises(ConfigError, match=rf"csv_monitor\.{key} is \"x+ \.\.\.; the name .* 200 bytes\. Shorten it"):
        check_launch(config, world_size=2)
