"""Where a run starts from, as the command line says it."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from dsaux.checkpoint import partial_folder, publish, write_file
from dsaux.config import Config, ConfigError, DataConfig, Launch, config_from_dict
from dsaux.resume import Start, _check_agreement, changes_since, check_start, config_of, plan_start

DOCUMENT = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "dsaux": {"pipeline": {"stages": 2}, "data": {"loader": "torch"}},
}
LAUNCH = Launch(2, 2, 1, 8, 8, 1)


@pytest.fixture
def config() -> Config:
    """A checked configuration."""
    return config_from_dict(DOCUMENT)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(path: str, *, steps: tuple[int, ...] = (), config: Config | None = None, age_s: float = 0) -> Path:
    """A run folder with checkpoints."""
    run = Path(path)
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for step in steps:
        folder, name = run / "checkpoint", f"step_{step:08d}"
        partial_folder(folder, name).mkdir(parents=True)
        entry = write_file(partial_folder(folder, name) / "rank_000-states.pt", {"step": step})
        layout = {"schedule": "al", "stages": 2, "replicas": 1, "micro_batches": 1, "bounds": [0, 2, 6]}
        content = {"step": step, "num_layers": 6, "is_drained": True, "layout": layout}
        if config is not None:
            content |= {"config": config.to_dict(), "train_batch_size": 8}
        publish(folder, name, entries=[entry], content=content, latest=True)
    if steps:
        now = (run / "checkpoint").stat().st_mtime
        os.utime(run / "checkpoint", (now - age_s, now - age_s))
    return run


def test_without_resume_a_run_starts_anew() -> None:
    assert plan_start(None, run_dir="runs/a", name="a") == Start()


def test_a_run_goes_on_in_its_own_folder() -> None:
    run = make_run("runs/a", steps=(3, 6))
    for given in ("runs/a", "runs/a/"):
        assert plan_start(given, run_dir=None, name="b") == Start(source=run, run_dir=run)
        assert plan_start(given, run_dir="runs/../runs/a", name="b") == Start(source=run, run_dir=run)


def test_one_checkpoint_of_a_run_goes_on_in_the_folder_of_the_run() -> None:
    run = make_run("runs/a", steps=(3, 6))
    source = run / "checkpoint/step_00000003"
    assert plan_start(str(source), run_dir=None, name="b") == Start(source=source, run_dir=run)


def test_another_run_dir_makes_a_new_run_from_the_checkpoint() -> None:
    run = make_run("runs/a", steps=(3,))
    assert plan_start("runs/a", run_dir="runs/b", name="b") == Start(source=run, run_dir=None)


def test_latest_is_the_newest_run_of_this_name() -> None:
    make_run("runs/a", steps=(9,), age_s=100)
    second = make_run("runs/a-2", steps=(3,), age_s=50)
    make_run("runs/a-other", steps=(3,))
    make_run("runs/ab", steps=(3,))
    make_run("runs/a-3")
    assert plan_start("latest", run_dir=None, name="a") == Start(source=second, run_dir=second)


@pytest.mark.parametrize("name", ["lr[0.1]", "what?", "*", "a [b]"])
def test_latest_finds_a_run_whose_name_would_mean_something_in_a_pattern(name: str) -> None:
    make_run("runs/other", steps=(3,))
    make_run(f"runs/{name}", steps=(3,), age_s=100)
    second = make_run(f"runs/{name}-2", steps=(3,))
    assert plan_start("latest", run_dir=None, name=name) == Start(source=second, run_dir=second)


def test_latest_starts_anew_where_there_is_nothing() -> None:
    assert plan_start("latest", run_dir=None, name="a") == Start()
    assert plan_start("latest", run_dir="runs/a", name="a") == Start()


def test_latest_starts_anew_in_the_folder_of_a_run_that_ended_before_its_first_checkpoint() -> None:
    run = make_run("runs/a")
    assert plan_start("latest", run_dir="runs/a", name="a") == Start(source=None, run_dir=run)


@pytest.mark.parametrize(
    ("given", "words"),
    [("nowhere", "is not a folder"), (".", "holds no checkpoint"), (" ", "--resume is empty")],
)
def test_a_wrong_folder_is_refused(given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_start(given, run_dir=None, name="a")


def test_the_configuration_is_found_from_run_and_checkpoint() -> None:
    run = make_run("runs/a", steps=(3,))
    for given in ("runs/a", "runs/a/checkpoint", "runs/a/checkpoint/step_00000003"):
        assert config_of(given, run_dir=None) == run / "config.json"
    assert config_of("latest", run_dir="runs/a") == run / "config.json"
    assert config_of("latest", run_dir=None) is None


SAME_STREAM = {
    "root": "elsewhere",
    "download": "false",
    "verify": "false",
    "loader": "dali",
    "workers": "2",
    "decode": "once_per_node",
    "test_samples": "99",
    "guard_every": "7",
}
"""Keys of the data block with which the run still goes on through the same samples, each with another value."""
OTHER_STREAM = {
    "name": "cifar10",
    "train_samples": "99",
    "image_size": "16",
    "context": "32",
    "augment": "false",
    "cutout": "4",
    "rand_augment": "2",
    "color": "0.4",
}
"""The others."""


def test_of_every_key_of_the_data_it_is_known_whether_it_may_change() -> None:
    keys = {key.name for key in fields(DataConfig)}
    assert set(SAME_STREAM) | set(OTHER_STREAM) == keys, "say of a new key whether --resume may change it"
    assert not set(SAME_STREAM) & set(OTHER_STREAM)
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| `data."))
    assert set(re.findall(r"`data\.(\w+)`", row)) == set(SAME_STREAM)


@pytest.mark.parametrize(("key", "value"), SAME_STREAM.items())
def test_a_key_that_leaves_the_stream_of_samples_may_change_and_is_named(key: str, value: str, config: Config) -> None:
    run = make_run("runs/a", steps=(3,), config=config)
    other = config_from_dict(DOCUMENT, overrides=[f"dsaux.data.{key}={value}"])
    found = check_start(Start(source=run), other, LAUNCH, is_first=True)
    assert found is not None
    assert f"dsaux.data.{key} " in changes_since(found.content, other)[0]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", '"resnet14"'),
        ("run.seed", "5"),
        *((f"data.{key}", value) for key, value in OTHER_STREAM.items()),
    ],
)
def test_another_network_or_stream_is_refused_on_every_rank(
    config: Config, key: str, value: str, is_first: bool
) -> None:
    run = make_run("runs/a", steps=(3,), config=config)
    other = config_from_dict(DOCUMENT, overrides=[f"dsaux.{key}={value}"])
    with pytest.raises(ConfigError, match=rf"dsaux\.{key} is .* was trained with"):
        check_start(Start(source=run), other, LAUNCH, is_first=is_first)


def test_a_run_from_before_a_key_goes_on_as_long_as_the_key_is_off(config: Config) -> None:
    document = config.to_dict()
    for key in ("cutout", "rand_augment"):
        del document["dsaux"]["data"][key]
    assert not [words for words in changes_since({"config": document}, config) if "cutout" in words]
    content = {"config": document, "train_batch_size": 8}
    _check_agreement(content, config, LAUNCH, source=Path("runs/a"))
    other = config_from_dict(DOCUMENT, overrides=["dsaux.data.cutout=4"])
    with pytest.raises(ConfigError, match=r"dsaux\.data\.cutout is 4 but runs/a was trained with 0"):
        _check_agreement(content, other, LAUNCH, source=Path("runs/a"))


def test_another_global_batch_is_refused(config: Config) -> None:
    run = make_run("runs/a", steps=(3,), config=config)
    with pytest.raises(ConfigError, match="train_batch_size is 16 but runs/a was trained with 8"):
        check_start(Start(source=run), config, Launch(2, 2, 1, 16, 16, 1), is_first=True)


def test_rank_0_alone_reads_the_files(config: Config) -> None:
    run = make_run("runs/a", steps=(3, 6), config=config)
    assert check_start(Start(source=run), config, LAUNCH, is_first=False) is None
    found = check_start(Start(source=run), config, LAUNCH, is_first=True)
    assert found is not None
    assert found.step == 6


def test_changed_keys_are_named_with_both_values(config: Config) -> None:
    other = config_from_dict(DOCUMENT, overrides=["optimizer.params.lr=0.2", "dsaux.aux.beta=3", "dsaux.run.name=b"])
    assert changes_since({"config": config.to_dict()}, other) == [
        "Changed since the checkpoint: dsaux.aux.beta 10.0 to 3.0, optimizer.params.lr 0.1 to 0.2."
    ]
    assert changes_since({"config": config.to_dict()}, config) == []
    assert changes_since({}, config) == []


def test_the_data_sets_own_image_size_agrees_with_the_number(config: Config) -> None:
    """Older versions wrote 32 where null stands now."""
    run = make_run("runs/a", steps=(3,), config=config_from_dict(DOCUMENT, overrides=["dsaux.data.image_size=32"]))
    assert check_start(Start(source=run), config, LAUNCH, is_first=True) is not None
    assert changes_since({"config": {"dsaux": {"data": {"name": "photos", "image_size": 32}}}}, config) == (
        changes_since({"config": {"dsaux": {"data": {"name": "photos"}}}}, config)
    )
    other = config_from_dict(DOCUMENT, overrides=["dsaux.data.image_size=16"])
    with pytest.raises(ConfigError, match=r"dsaux\.data\.image_size is 16 but runs/a was trained with 32"):
        check_start(Start(source=run), other, LAUNCH, is_first=True)
