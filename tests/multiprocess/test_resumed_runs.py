"""What a run goes on with that is resumed where something else is due than the next step, or under other settings."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.runs import STDERR, TIME_LIMIT_S, end_with_children, train
from tests.launch.small import STEPS_PER_EPOCH, write_config
from tests.launch.start import events
from tests.ranks import PRELOADED, free_port, rank_environment

pytestmark = pytest.mark.multiprocess

WORLD_SIZE = 2
SPAN = "scheduler.params.total_num_steps=16"
"""The same learning rates, however many steps a run has."""
EXACT = ("dsaux.run.exact_epochs=1", "dsaux.run.exact_lr=0.02")


def run(folder: Path, *settings: str, resume: Path | None = None, schedule: str = "al") -> Path:
    """Train two epochs on two ranks in a folder that is made for it, and return the run's folder.

    Args:
        folder: where it runs.
        settings: keys with other values, as --set takes them.
        resume: checkpoint to go on from.
        schedule: of the configuration.
    """
    folder.mkdir()
    config = write_config(
        folder / "config.json",
        pipeline={"partition": "uniform", "schedule": schedule},
        run={"epochs": 2, "eval_every": 0, "checkpoint_every": 4, "keep": 9},
    )
    arguments = ["--ds_config", str(config), "--run_dir", str(folder / "run")]
    arguments += [word for setting in settings for word in ("--set", setting)]
    arguments += ["--resume", str(resume)] if resume else []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    ranks = []
    for rank in range(WORLD_SIZE):
        launcher = rank_environment(rank, WORLD_SIZE, port=port, device="cpu")
        ranks.append(context.Process(target=train, args=(str(folder), tuple(arguments), TIME_LIMIT_S, launcher)))
        ranks[-1].start()
    for process in ranks:
        process.join(TIME_LIMIT_S)
        if process.exitcode is None:
            end_with_children(process.pid)
    assert [process.exitcode for process in ranks] == [0] * WORLD_SIZE, (folder / STDERR).read_text()
    return folder / "run"


def at_step(run_dir: Path, step: int) -> Path:
    """A run's checkpoint."""
    return run_dir / f"checkpoint/step_{step:08d}"


def figures(run_dir: Path, kind: str, *keys: str, after: int = 0) -> list[list[Any]]:
    """Some figures of every step or evaluation behind a step."""
    return [[event[key] for key in keys] for event in events(run_dir, kind) if event["step"] > after]


@pytest.fixture(scope="module", params=["al", "local"])
def under_way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A schedule, and a run under it whose checkpoint after an epoch holds batches under way."""
    return request.param, run(tmp_path_factory.mktemp("base") / "two", SPAN, schedule=request.param)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["dsaux.run.eval_every=1"], id="an evaluation is due"),
        pytest.param(EXACT, id="exact epochs begin"),
        pytest.param(["dsaux.run.epochs=1"], id="nothing is left"),
    ],
)
def test_batches_under_way_are_finished_though_no_step_comes_first(
    under_way: tuple[str, Path], settings: list[str], tmp_path: Path
) -> None:
    """As in a run that did the same without a stop: it has finished them at this step as well."""
    schedule, base = under_way
    straight = run(tmp_path / "straight", SPAN, *settings, schedule=schedule)
    resumed = run(tmp_path / "resumed", SPAN, *settings, schedule=schedule, resume=at_step(base, STEPS_PER_EPOCH))
    rest = {"after": STEPS_PER_EPOCH - 1}
    assert figures(resumed, "eval", "step", "top1", "loss") == figures(straight, "eval", "step", "top1", "loss", **rest)
    rest = {"after": STEPS_PER_EPOCH}
    keys = ("step", "loss", "learning_rate", "phase")
    assert figures(resumed, "step", *keys) == figures(straight, "step", *keys, **rest)


# ---- exact epochs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second epoch is exact, with a learning rate of its own."""
    return run(tmp_path_factory.mktemp("base") / "tail", *EXACT)


def test_a_run_that_is_prolonged_goes_back_to_its_schedule_until_its_exact_epochs(
    with_tail: Path, tmp_path: Path
) -> None:
    longer = "dsaux.run.epochs=4"
    straight = run(tmp_path / "straight", *EXACT, longer)
    resumed = run(tmp_path / "resumed", *EXACT, longer, resume=at_step(with_tail, 2 * STEPS_PER_EPOCH))
    keys = ("step", "phase", "learning_rate")
    assert figures(resumed, "step", *keys) == figures(straight, "step", *keys, after=2 * STEPS_PER_EPOCH)
    assert figures(resumed, "step", "phase")[0] == ["al"]
    (note,) = [text for text in events(resumed, "resumed")[0]["notes"] if "exact epochs" in text]
    assert "it goes on under al" in note


def test_exact_epochs_take_the_learning_rate_and_the_end_of_the_new_configuration(
    with_tail: Path, tmp_path: Path
) -> None:
    middle = STEPS_PER_EPOCH + 4
    before = figures(with_tail, "step", "phase", "learning_rate", after=middle)
    doubled = run(tmp_path / "doubled", EXACT[0], "dsaux.run.exact_lr=0.04", resume=at_step(with_tail, middle))
    assert figures(doubled, "step", "phase", "learning_rate") == [[phase, 2 * rate] for phase, rate in before]
    changed = run(tmp_path / "changed", EXACT[0], resume=at_step(with_tail, middle))
    plain = run(tmp_path / "plain", EXACT[0])
    assert figures(changed, "step", "phase", "learning_rate") == figures(
        plain, "step", "phase", "learning_rate", after=middle
    )


def test_a_run_under_1f1b_throughout_goes_on_under_the_new_schedule(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact", schedule="1f1b")
    rates = figures(exact, "step", "learning_rate", after=STEPS_PER_EPOCH)
    resumed = run(tmp_path / "resumed", schedule="penalty", resume=at_step(exact, STEPS_PER_EPOCH))
    assert figures(resumed, "step", "phase", "learning_rate") == [["penalty", rate] for (rate,) in rates]


def test_a_run_goes_on_under_1f1b_throughout_from_its_exact_epochs(with_tail: Path, tmp_path: Path) -> None:
    exact = run(tmp_path / "exact", schedule="1f1b")
    resumed = run(tmp_path / "resumed", schedule="1f1b", resume=at_step(with_tail, STEPS_PER_EPOCH + 4))
    keys = ("step", "phase", "learning_rate")
    assert figures(resumed, "step", *keys) == figures(exact, "step", *keys, after=STEPS_PER_EPOCH + 4)
