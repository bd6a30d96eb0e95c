"""Loading a configuration: defaults, files, overrides, round trip, and every mistake that the document alone"
" shows."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsaux.config import (
    Config,
    ConfigError,
    aux_optimizer,
    check_launch,
    config_from_dict,
    has_aux_net,
    load_config,
    main,
    markdown_table,
)
from tests.bad_input import CASES, REMOVE, BadInput, good_config

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def _config(*overrides: str, **sets: Any) -> Config:
    return config_from_dict(good_config(sets), overrides=overrides)


# ---- the document ------------------------------------------------------------------------------------------


def test_smallest_document_takes_all_defaults() -> None:
    config = config_from_dict(
        {"train_batch_size": 8, "optimizer": {"type": "SGD"}, "dsaux": {"pipeline": {"stages": 1}}}
    )
    settings = config.dsaux
    assert (settings.model.name, settings.data.name, settings.data.loader) == ("resnet20", "photos", "dali")
    assert (settings.pipeline.schedule, settings.pipeline.partition) == ("penalty", "time")
    assert (settings.aux.beta, settings.aux.rho, settings.aux.gamma, settings.aux.depth) == (
        10.0,
        1.0,
        1.0,
        1,
    )
    assert (settings.aux.optimizer, settings.run.max_steps, settings.run.exact_epochs) == (None, None, 0)


def test_document_of_the_caller_is_not_changed() -> None:
    document = good_config()
    before = json.dumps(document)
    config = config_from_dict(document, overrides=["dsaux.aux.beta=3", "train_batch_size=64"])
    config.to_dict()["optimizer"]["type"] = "Adam"
    assert json.dumps(document) == before
    assert config.deepspeed["optimizer"]["type"] == "SGD"


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _config().dsaux.aux.beta = 3.0  # type: ignore[misc]


def test_whole_numbers_become_floats_where_numbers_are_asked_for() -> None:
    beta = _config("dsaux.aux.beta=30").dsaux.aux.beta
    assert beta == 30.0
    assert isinstance(beta, float)


ROUND_TRIPS = [
    {},
    {"dsaux.pipeline.partition": [2]},
    {"dsaux.pipeline.partition": ["group2.block1"]},
    {"dsaux.aux.optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}},
    {"dsaux.run.max_steps": 5, "dsaux.run.exact_epochs": 1, "dsaux.run.exact_lr": 0.01},
    {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": True}},
    {"csv_monitor": {"enabled": True, "output_path": "x"}, "wall_clock_breakdown": True},
]


@pytest.mark.parametrize("sets", ROUND_TRIPS)
def test_effective_document_makes_the_same_configuration(sets: dict[str, Any]) -> None:
    config = config_from_dict(good_config(sets))
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("document", [[], None, "text", 3])
def test_document_that_is_no_object_is_refused(document: Any) -> None:
    with pytest.raises(ConfigError, match="it must be a JSON object"):
        config_from_dict(document)


def test_settings_of_the_auxnet_are_no_error_in_the_exact_twin() -> None:
    config = _config(**{"dsaux.pipeline.schedule": "1f1b", "dsaux.aux.beta": 30, "dsaux.aux.width": 0.5})
    assert config.dsaux.aux.beta == 30.0


@pytest.mark.parametrize("case", [case for case in CASES if case.is_in_the_document], ids=lambda case: case.name)
def test_wrong_document_is_refused(case: BadInput) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launch(config_from_dict(good_config(case.sets)), world_size=2)
    assert case.says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_the_cases_are_unique_and_many() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("name", [".", "..", "", "  ", "a/b", "a\\b", "a\0b"])
def test_name_of_the_run_must_be_a_folders_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"dsaux\.run\.name"):
        _config(**{"dsaux.run.name": name})


@pytest.mark.parametrize("key", ["beta", "epochs", "stages", "pipeline_", "schedule"])
def test_key_outside_its_block_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        _config(**{key: 1})


def test_own_model_and_data_need_no_place_in_our_tables() -> None:
    # the library takes any model: names and data set are checked with the launch, not with the document
    _config(**{"dsaux.model.name": "my own network", "dsaux.pipeline.stages": 40})


# ---- files -------------------------------------------------------------------------------------------------


def _write(folder: Path, text: str) -> Path:
    path = folder / "config.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path, json.dumps(good_config()))
    assert load_config(path) == load_config(str(path)) == _config()
    assert load_config(path, overrides=["dsaux.run.seed=3"]).dsaux.run.seed == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON: .* at line 1, column 2"),
        ("{}", 'has no "dsaux" block'),
        ("[]", "it must be a JSON object"),
        ("3", "it must be a JSON object"),
        ('{"a": 1, "a": 2}', r'key "a" stands twice in one block \(1 and 2\)'),
        ('{"dsaux": {"aux": {"beta": 1, "beta": 2}}}', "stands twice"),
        ('{"a": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
        ("\ufeff{}", "is not JSON"),
        ('{"train_batch_size": NaN}', "train_batch_size is nan"),
        ('{"train_batch_size": 1e999}', "train_batch_size is inf"),
    ],
)
def test_file_that_holds_something_else_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert str(caught.value).startswith((str(path), "train_batch_size"))


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize(("name", "says"), [("missing.json", "No such file"), (".", "Is a directory")])
def test_file_that_cannot_be_opened_is_refused(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(tmp_path / name)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_loads_and_starts(path: Path) -> None:
    config = load_config(path, overrides=["dsaux.data.loader=torch"])
    has_data = config.dsaux.data.name in ("photos", "synthetic", "text")  # the others would be fetched, or are not here
    check_launch(config, world_size=config.dsaux.pipeline.stages, needs_data=has_data)


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem.endswith("_1f1b")], ids=lambda path: path.name)
def test_exact_twin_differs_in_schedule_and_name_only(path: Path) -> None:
    twin = json.loads(path.read_text())
    original = json.loads(path.with_name(path.name.replace("_1f1b", "")).read_text())
    assert twin["dsaux"]["pipeline"].pop("schedule") == "1f1b"
    assert original["dsaux"]["pipeline"].pop("schedule") != "1f1b"
    assert twin["dsaux"]["run"].pop("name") != original["dsaux"]["run"].pop("name")
    assert twin == original


def test_quickstart_and_its_twin_are_shipped() -> None:
    assert {"quickstart.json", "quickstart_1f1b.json"} <= {path.name for path in SHIPPED}


# ---- overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("dsaux.aux.beta=30", "dsaux.aux.beta", 30.0),
        ("dsaux.aux.beta=3e1", "dsaux.aux.beta", 30.0),
        ("train_batch_size=64", "train_batch_size", 64),
        ("dsaux.run.name=long run", "dsaux.run.name", "long run"),
        ('dsaux.run.name="5"', "dsaux.run.name", "5"),
        ("dsaux.run.name=a=b", "dsaux.run.name", "a=b"),
        ("dsaux.pipeline.partition=[2]", "dsaux.pipeline.partition", [2]),
        ('dsaux.pipeline.partition=["head"]', "dsaux.pipeline.partition", ["head"]),
        ("dsaux.data.augment=false", "dsaux.data.augment", False),
        ("dsaux.run.max_steps=null", "dsaux.run.max_steps", None),
        ("wall_clock_breakdown=true", "wall_clock_breakdown", True),
        ("csv_monitor.enabled=true", "csv_monitor.enabled", True),
        ('csv_monitor={"enabled": true}', "csv_monitor.enabled", True),
        ("timers.throughput.enabled=false", "timers.throughput.enabled", False),
        (" dsaux.aux.beta =30", "dsaux.aux.beta", 30.0),
    ],
)
def test_override_sets_one_key(override: str, path: str, value: Any) -> None:
    found: Any = _config(override).to_dict()
    for key in path.split("."):
        found = found[key]
    assert found == value
    assert type(found) is type(value)


def test_override_fills_a_block_that_is_null() -> None:
    config = _config("dsaux.aux.optimizer.type=AdamW", **{"dsaux.aux.optimizer": None})
    assert config.dsaux.aux.optimizer == {"type": "AdamW"}


def test_last_override_counts() -> None:
    assert _config("dsaux.aux.beta=3", "dsaux.aux.beta=4").dsaux.aux.beta == 4.0


def test_override_adds_the_whole_block() -> None:
    document = good_config({"dsaux": REMOVE})
    assert config_from_dict(document, overrides=["dsaux.pipeline.stages=1"]).dsaux.pipeline.stages == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dsaux.aux.beta", "is not of the form"),
        ("", "is not of the form"),
        ("=3", "is not of the form"),
        ("dsaux..beta=3", "is not of the form"),
        ("dsaux.aux.=3", "is not of the form"),
        ("dsaux.aux.beta=", "it must be a number"),
        ("dsaux.aux.bta=3", r"Did you mean beta\?"),
        ("dsuax.aux.beta=3", "dsuax is not a known key"),
        ("train_batch_size.size=3", "which is 32 and has no keys. Set train_batch_size itself"),
        ("dsaux.pipeline.partition.first=3", "goes through dsaux.pipeline.partition"),
        ("dsaux.run.name=5", "dsaux.run.name is 5; it must be a string"),
        ("optimizer.params.lr=NaN", "optimizer.params.lr is nan"),
        ('csv_monitor={"enabled": true, "enabled": false}', "stands twice"),
        ("train_batch_size=1" + "0" * 5000, "cannot be read"),
        ("train_batch_size=" + "[" * 100_000, "cannot be read"),
    ],
)
def test_wrong_override_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _config(override)


@pytest.mark.parametrize("value", [1, "true", None, "on", []])
def test_cuda_graphs_is_a_flag(value: Any) -> None:
    assert not _config().dsaux.run.cuda_graphs
    assert _config("dsaux.run.cuda_graphs=true").dsaux.run.cuda_graphs
    with pytest.raises(ConfigError, match=r"dsaux\.run\.cuda_graphs is .*true or false"):
        _config(**{"dsaux.run.cuda_graphs": value})


# ---- the AuxNet's optimizer --------------------------------------------------------------------------------


def test_auxnet_takes_the_optimizer_of_the_stages() -> None:
    config = _config(**{"optimizer.params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}})
    assert aux_optimizer(config) == ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True})


def test_auxnet_takes_its_own_optimizer() -> None:
    config = _config(**{"dsaux.aux.optimizer": {"type": "AdamW", "params": {"lr": 0.001}}})
    name, params = aux_optimizer(config)
    params["lr"] = 5.0
    assert aux_optimizer(config) == ("AdamW", {"lr": 0.001})
    assert name == "AdamW"


def test_optimizer_that_the_auxnet_cannot_have_is_fine_where_there_is_none() -> None:
    _config(**{"optimizer": {"type": "Lamb"}, "dsaux.pipeline.schedule": "1f1b"})
    _config(**{"optimizer": {"type": "Lamb"}, "dsaux.pipeline.stages": 1})
    _config(**{"optimizer": {"type": "Lamb"}, "dsaux.aux.optimizer": {"type": "SGD"}})


# ---- the documentation -------------------------------------------------------------------------------------


def test_every_key_stands_in_the_table_once() -> None:
    table = markdown_table()
    for block, keys in _config().to_dict()["dsaux"].items():
        for key in keys:
            assert table.count(f"| `dsaux.{block}.{key}` |") == 1
    assert all(line.count(" | ") == 3 for line in table.splitlines()[2:])


def test_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--markdown"])
    assert capsys.readouterr().out.strip() == markdown_table()


def test_configuration_is_checked_without_pytorch() -> None:
    program = (
        "import sys; from dsaux.config import *; "
        f"c = load_config({str(ROOT / 'ds_configs' / 'quickstart.json')!r},"
        " overrides=['dsaux.data.loader=torch']); "
        "check_launch(c, world_size=2); print([name for name in ('torch', 'deepspeed') if name in"
        " sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- settings without effect -------------------------------------------------------------------------------


def test_keys_of_al_are_named_where_another_schedule_does_not_use_them() -> None:
    keys = {"dsaux.aux.overlap": True, "dsaux.aux.transport": "bf16"}
    overlap, transport = _config(**keys, **{"dsaux.pipeline.schedule": "penalty"}).settings_without_effect()
    assert "dsaux.aux.overlap is true, which has no effect with schedule penalty" in overlap
    assert 'dsaux.aux.transport is "bf16"' in transport
    assert _config(**keys, **{"dsaux.pipeline.schedule": "al"}).settings_without_effect() == []
    assert _config(**{"dsaux.pipeline.schedule": "penalty"}).settings_without_effect() == []


def test_under_local_each_changed_key_of_the_auxnet_is_named_and_the_transport_counts() -> None:
    keys = {"dsaux.aux.beta": 3.0, "dsaux.aux.gamma": 0.5, "dsaux.aux.optimizer": {"type": "Adam"}}
    local = {"dsaux.pipeline.schedule": "local"}
    beta, gamma, optimizer = _config(**keys, **local).settings_without_effect()
    assert "dsaux.aux.beta is 3.0, which has no effect with schedule local" in beta
    assert "dsaux.aux.gamma is 0.5" in gamma
    assert 'dsaux.aux.optimizer is {"type": "Adam"}' in optimizer
    assert _config(**local, **{"dsaux.aux.transport": "bf16", "dsaux.run.epochs": 3}).settings_without_effect() == []


def test_only_penalty_and_al_over_several_stages_have_an_auxnet() -> None:
    for schedule, stages, expected in (("al", 2, True), ("penalty", 2, True), ("al", 1, False), ("local", 2, False)):
        changes = {"dsaux.pipeline.schedule": schedule, "dsaux.pipeline.stages": stages}
        assert has_aux_net(_config(**changes).dsaux) == expected
    assert not has_aux_net(_config(**{"dsaux.pipeline.schedule": "1f1b"}).dsaux)


def test_a_twin_under_1f1b_is_not_warned_of_the_block_it_shares() -> None:
    keys = {"dsaux.aux.overlap": True, "dsaux.pipeline.schedule": "1f1b"}
    assert _config(**keys).settings_without_effect() == []


def test_channels_last_is_said_to_have_no_effect_on_text_and_none_on_the_weights_in_a_flat_tensor() -> None:
    key = {"dsaux.run.channels_last": True}
    assert _config(**key).settings_without_effect() == []
    (text,) = _config(**key, **{"dsaux.data.name": "text", "dsaux.model.name": "a.py:f"}).settings_without_effect()
    assert "dsaux.run.channels_last is true, which has no effect on text" in text
    (bf16,) = _config(**key, bf16={"enabled": True}).settings_without_effect()
    assert "activations but not their weights" in bf16
    assert _config(**key, bf16={"enabled": False}, zero_optimization={"stage": 0}).settings_without_effect() == []


def test_a_stream_for_the_auxnet_is_said_to_have_no_effect_where_there_is_none() -> None:
    key = {"dsaux.run.aux_stream": True}
    for schedule in ("penalty", "al", "1f1b"):
        assert _config(**key, **{"dsaux.pipeline.schedule": schedule}).settings_without_effect() == []
    (local,) = _config(**key, **{"dsaux.pipeline.schedule": "local"}).settings_without_effect()
    assert "dsaux.run.aux_stream is true, which has no effect with schedule local and 2 stages" in local
    (alone,) = _config(**key, **{"dsaux.pipeline.stages": 1}).settings_without_effect()
    assert "and 1 stage: there is no AuxNet" in alone


def test_compile_is_said_to_leave_stages_with_activation_checkpoints_as_they_are() -> None:
    key = {"dsaux.run.compile": True}
    assert _config(**key).settings_without_effect() == []
    (text,) = _config(**key, pipeline={"activation_checkpoint_interval": 1}).settings_without_effect()
    assert "dsaux.run.compile is true, which has no effect on the stages" in text


@pytest.mark.parametrize(("key", "value"), [("transport", "fp16"), ("overlap", "yes")])
def test_wrong_values_of_the_keys_of_al_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"dsaux\.aux\.{key} is"):
        _config(**{f"dsaux.aux.{key}": value})
