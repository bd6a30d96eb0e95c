"""Where a run starts from: at the beginning, or at a checkpoint. train.py asks before any process group exists.

--resume DIR       go on from the newest whole checkpoint of a run folder, or from one checkpoint folder
--resume latest    go on in --run_dir, or in the newest folder of this run's name; start anew where there is none
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsaux.checkpoint import CHECKPOINT_FOLDER, FoundCheckpoint, find_checkpoint, has_checkpoint, peek
from dsaux.config import Config, Launch, default_value
from dsaux.config_rules import ConfigError, show
from dsaux.data import default_image_size
from dsaux.metrics import CONFIG_FILE, RUNS_FOLDER

LATEST = "latest"
_MUST_AGREE = (
    "dsaux.model.name",
    "dsaux.model.args",
    "dsaux.data.name",
    "dsaux.data.train_samples",
    "dsaux.data.image_size",
    "dsaux.data.context",
    "dsaux.data.augment",
    "dsaux.data.cutout",
    "dsaux.data.rand_augment",
    "dsaux.data.color",
    "dsaux.run.seed",
)
"""Keys without which the step of a checkpoint would mean another place in another stream of images."""
_IMAGE_SIZE = "dsaux.data.image_size"
_NO_MATTER = tuple(
    f"dsaux.run.{key}" for key in ("name", "checkpoint_every", "keep", "log_every", "profile_steps", "cuda_graphs")
)


@dataclass(frozen=True)
class Start:
    """Where a run starts from, and where it is recorded.

    Attributes:
        source: run or checkpoint folder to go on from; None starts anew.
        run_dir: run folder to go on in; None makes a new one, as --run_dir says.
    """

    source: Path | None = None
    run_dir: Path | None = None


def config_of(resume: str | None, *, run_dir: str | None) -> Path | None:
    """The configuration of the run to go on with or to evaluate, for a command line without --ds_config."""
    for given in (resume, run_dir):
        if given and given != LATEST:
            for folder in (Path(given), *_run_folder_of(Path(given))):
                if (folder / CONFIG_FILE).is_file():
                    return folder / CONFIG_FILE
    return None


def plan_start(resume: str | None, *, run_dir: str | None, name: str) -> Start:
    """Read the command line; looks at folders, reads no file.

    Args:
        resume: value of --resume; None without it.
        run_dir: value of --run_dir; None without it.
        name: name of the run.

    Raises:
        ConfigError: if --resume names a folder without a checkpoint.
    """
    given = None if run_dir is None else Path(run_dir)
    if resume is None:
        return Start()
    if resume == LATEST:
        return _plan_latest(given, name)
    if not resume.strip():
        raise ConfigError("--resume is empty. Give the folder of a run or of a checkpoint, or latest.")
    source = Path(resume)
    if not has_checkpoint(source):
        state = "holds no checkpoint" if source.is_dir() else "is not a folder"
        raise ConfigError(
            f"--resume {resume} {state}. Give the folder of a run that has saved one, one of the folders below its "
            f"{CHECKPOINT_FOLDER}/, or latest."
        )
    own = _run_folder_of(source)
    if given is None or any(_is_same(given, folder) for folder in own):
        return Start(source=source, run_dir=own[0] if own else None)
    return Start(source=source)


def _plan_latest(given: Path | None, name: str) -> Start:
    if given is not None:
        has_run = (given / CONFIG_FILE).is_file()
        source = given if has_checkpoint(given) else None
        return Start(source=source, run_dir=given) if has_run or source else Start()
    folders = [
        path
        for path in Path(RUNS_FOLDER).glob(f"{glob.escape(name)}*")
        if _is_of(path.name, name) and has_checkpoint(path)
    ]
    if not folders:
        return Start()
    newest = max(folders, key=lambda path: (path / CHECKPOINT_FOLDER).stat().st_mtime)
    return Start(source=newest, run_dir=newest)


def _is_of(folder: str, name: str) -> bool:
    """Whether a folder is <name>, <name>-2, <name>-3, ..."""
    rest = folder.removeprefix(name)
    return rest == "" or (rest.startswith("-") and rest[1:].isdigit())


def _run_folder_of(path: Path) -> list[Path]:
    """The run folder that a path is, or lies in; empty if it is in none."""
    return [folder for folder in (path, path.parent, path.parent.parent) if (folder / CONFIG_FILE).is_file()][:1]


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def check_start(start: Start, config: Config, launch: Launch, *, is_first: bool) -> FoundCheckpoint | None:
    """Find the checkpoint on rank 0; on every rank hold the configuration against it.

    Args:
        start: what :func:`plan_start` gave.
        config: the checked configuration.
        launch: processes and batch sizes.
        is_first: whether this is rank 0, which alone reads the files.

    Returns:
        The checkpoint, verified, on rank 0; None on the others, and where the run starts anew.

    Raises:
        ConfigError: if no checkpoint is whole, or it was written with another network, data or batch.
    """
    if start.source is None:
        return None
    found = find_checkpoint(start.source) if is_first else None
    content = found.content if found is not None else peek(start.source)
    if content is not None and "config" in content:  # a script of one's own may have written none
        _check_agreement(content, config, launch, source=start.source)
    return found


def _check_agreement(content: Mapping[str, Any], config: Config, launch: Launch, *, source: Path) -> None:
    for key in _MUST_AGREE:
        given, saved = (_value(document, key) for document in (config.to_dict(), content["config"]))
        if saved != given:
            raise ConfigError(
                f"{key} is {show(given)} but {source} was trained with {show(saved)}; a run goes on with the same "
                f"network and data. Set it to {show(saved)}, or start anew without --resume."
            )
    batch = content["train_batch_size"]
    if batch != launch.train_batch_size:
        raise ConfigError(
            f"train_batch_size is {launch.train_batch_size} but {source} was trained with {batch}; a run goes on with "
            f"the same global batch. Set it to {batch}, or start anew without --resume."
        )


def _value(document: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted path, blocks included; the default where a dsaux that did not have the key wrote it."""
    value: Any = document
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            value = default_value(key)
            break
        value = value[part]
    if key == _IMAGE_SIZE and value is None:  # older versions wrote the number
        return default_image_size(_value(document, "dsaux.data.name"))
    return list(value) if isinstance(value, tuple) else value


def changes_since(content: Mapping[str, Any], config: Config) -> list[str]:
    """A sentence that names the keys which have other values than when the checkpoint was written; or none."""
    if "config" not in content:
        return []
    keys = {*flat(content["config"]), *flat(config.to_dict())}
    pairs = {key: (_value(content["config"], key), _value(config.to_dict(), key)) for key in sorted(keys)}
    changed = [
        f"{key} {show(saved)} to {show(given)}"
        for key, (saved, given) in pairs.items()
        if saved != given and key not in _NO_MATTER
    ]
    return [f"Changed since the checkpoint: {', '.join(changed)}."] if changed else []


def flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """A nested document by dotted path; lists are values."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}" if path else key)
        else:
            yield path, list(value) if isinstance(value, tuple) else value

    return dict(walk(document, ""))
