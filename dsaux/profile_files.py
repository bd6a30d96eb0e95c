"""The files of a run's profile, one a rank: `profile/rank_0.json` and so on, beside `profile/rank_0.trace.json`.

`dsaux.profile_run` writes them, `dsaux.profile_table` shows them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsaux.config_rules import ConfigError
from dsaux.profile import OTHER, TERMS

PROFILE_FOLDER = "profile"
FORMAT = 1
"""Grows when the meaning of a file changes."""


def terms_file(rank: int) -> str:
    """Name of the file with the terms of a rank."""
    return f"rank_{rank}.json"


def trace_file(rank: int) -> str:
    """Name of the file with the trace of a rank."""
    return f"rank_{rank}.trace.json"


@dataclass(frozen=True)
class RankProfile:
    """What one rank wrote.

    Attributes:
        rank: global rank.
        world_size: ranks of the run.
        stage: pipeline stage.
        stages: number of stages K.
        replica: data-parallel rank.
        replicas: number of replicas.
        schedule: penalty, al, local or 1f1b.
        micro_batches: in a step.
        device: such as cuda:0.
        timed_steps: numbers of the steps that the terms are means over.
        seconds_per_step: of a whole step.
        terms: seconds of each term in a step; they add up to `seconds_per_step`.
        traced_steps: numbers of the steps in the trace.
        trace: name of the trace's file beside this one; None where there is none.
        environment: as `dsaux.environment` describes it.
    """

    rank: int
    world_size: int
    stage: int
    stages: int
    replica: int
    replicas: int
    schedule: str
    micro_batches: int
    device: str
    timed_steps: tuple[int, ...]
    seconds_per_step: float
    terms: Mapping[str, float]
    traced_steps: tuple[int, ...]
    trace: str | None
    environment: Mapping[str, Any]


def read_profile(run: Path) -> list[RankProfile]:
    """The profiles of all ranks of a run, in the order of the ranks.

    Args:
        run: the run folder.

    Raises:
        ConfigError: if there is none, or it is damaged.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is not a folder. Give the folder of a run with dsaux.run.profile_steps above 0.")
    first = run / PROFILE_FOLDER / terms_file(0)
    if not first.is_file():
        raise ConfigError(
            f"{run} holds no profile ({PROFILE_FOLDER}/{first.name} is missing). Train with --set "
            "dsaux.run.profile_steps=5, or give another run folder."
        )
    profiles = [_read(first)]
    for rank in range(1, profiles[0].world_size):
        path = first.with_name(terms_file(rank))
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing: the profile is of {profiles[0].world_size} ranks, and each writes a file on its "
                "own host. Copy them into one folder, or profile again."
            )
        profiles.append(_read(path))
    for rank, its in enumerate(profiles):
        own, common = ((each.world_size, each.stages, each.schedule, each.timed_steps) for each in (its, profiles[0]))
        if own != common or its.rank != rank:
            raise ConfigError(
                f"{first.with_name(terms_file(rank))} is of another run than {first.name}. Profile again."
            )
    return profiles


def _read(path: Path) -> RankProfile:
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a run folder that can be.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path} is damaged: {reason}. Profile again (dsaux.run.profile_steps).") from error


def _checked(document: Any) -> RankProfile:
    if not isinstance(document, dict):
        raise ValueError("it holds no JSON object")
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']!r}, and this version of dsaux reads {FORMAT}")
    its = RankProfile(
        rank=_whole_number("rank", document["rank"]),
        world_size=_whole_number("world_size", document["world_size"]),
        stage=_whole_number("stage", document["stage"]),
        stages=_whole_number("stages", document["stages"]),
        replica=_whole_number("replica", document["replica"]),
        replicas=_whole_number("replicas", document["replicas"]),
        schedule=_text("schedule", document["schedule"]),
        micro_batches=_whole_number("micro_batches", document["micro_batches"]),
        device=_text("device", document["device"]),
        timed_steps=tuple(_whole_number("timed_steps", step) for step in document["timed_steps"]),
        seconds_per_step=_seconds("seconds_per_step", document["seconds_per_step"]),
        terms={name: _seconds(f"terms.{name}", document["terms"][name]) for name in (*TERMS, OTHER)},
        traced_steps=tuple(_whole_number("traced_steps", step) for step in document["traced_steps"]),
        trace=None if document["trace"] is None else Path(_text("trace", document["trace"])).name,
        environment=document["environment"],
    )
    if not its.timed_steps or its.world_size < 1 or its.stage >= its.stages:
        raise ValueError("its steps, ranks or stages cannot be")
    if not isinstance(its.environment, dict):
        raise ValueError("environment is no JSON object")
    return its


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}, no whole number")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, no text")
    return value


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, no number of seconds")
    return float(value)
