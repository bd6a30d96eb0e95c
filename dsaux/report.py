"""The run folder and the display of one run, on rank 0; nothing but the stage map on the others.

train.py opens it on every rank before the process group exists and keeps it open to the end of the run.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dsaux.config import Config, ConfigError
from dsaux.config_rules import show
from dsaux.data import default_image_size
from dsaux.display import RunDisplay
from dsaux.environment import describe_environment
from dsaux.metrics import CONFIG_FILE, RunFolder, StageRow, check_saved_run, create_run_folder, open_run_folder
from dsaux.resume import Start
from dsaux.run_lock import RunLock, hold_run
from dsaux.runtime import Place, Stopped
from dsaux.watch_rules import RunFailedError

if TYPE_CHECKING:  # the engine needs DeepSpeed, which is imported after the checks
    from dsaux.engine import AuxPipelineEngine
    from dsaux.partition import Partition


class Report:
    """Context of a run: shows it, and records how it ended.

    Attributes:
        folder: the run folder; None on all ranks but 0.
        display: what a person sees; None on all ranks but 0.
        lock: of the folder; None on all ranks but 0, and in an evaluation.
    """

    def __init__(self, folder: RunFolder | None, display: RunDisplay | None, *, lock: RunLock | None = None) -> None:
        self.folder, self.display, self.lock = folder, display, lock

    def __enter__(self) -> Report:
        if self.display:
            self.display.__enter__()
            if self.lock and self.lock.warning:
                self.display.warning(self.lock.warning)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.display:
            self.display.__exit__(kind, error, trace)
        if kind is not None and kind is not Stopped:
            text = str(error)
            named = f"{kind.__name__}: {text}" if text else kind.__name__
            self._record(text if kind is RunFailedError else named)
        if self.lock:
            self.lock.release()

    def failed(self, text: str) -> None:
        """Close the display and record why the run ends; the watch calls it while the main thread is blocked.

        Args:
            text: the cause.
        """
        if self.display:
            self.display.__exit__(None, None, None)
        self._record(text)

    def _record(self, text: str) -> None:
        if self.folder:
            with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the run
                self.folder.event("failed", error=text)

    def show_stages(self, engine: AuxPipelineEngine, *, partition: Partition, place: Place) -> None:
        """Gather what every rank holds and show it on rank 0; a collective over all ranks.

        Args:
            engine: this rank's engine.
            partition: the cut that all ranks agreed on.
            place: this rank's place.
        """
        import torch.distributed

        rows: list[StageRow] = [_stage_row(engine, partition=partition, place=place)] * place.world_size
        torch.distributed.all_gather_object(rows, rows[place.rank])
        if self.folder:
            self.folder.event(
                "stages",
                rows=[asdict(row) for row in rows],
                bounds=partition.bounds,
                stage_costs=partition.stage_costs,
                unit=partition.unit,
                method=partition.method,
            )
        if self.display:
            self.display.stages(rows, unit=partition.unit)


def open_report(
    config: Config,
    *,
    place: Place,
    run_dir: str | None,
    eval_only: bool,
    start: Start | None = None,
    lock: RunLock | None = None,
) -> Report:
    """Make or open the run folder and the display on rank 0; call it on every rank, before any process group.

    Args:
        config: the checked configuration.
        place: this rank's place.
        run_dir: the folder to use; None takes a numbered one under runs/.
        eval_only: evaluate the run in `run_dir` instead of starting one.
        start: where the run starts from, for one that goes on; it may do so in its own folder.
        lock: of that folder, if it is held already; the report keeps it to the end of the run.

    Raises:
        ConfigError: on rank 0, if the folder does not fit, or another run is at work in it.
    """
    if run_dir is not None and not run_dir.strip():
        raise ConfigError(
            "--run_dir is empty. Give the path of a folder, or leave it out for a numbered one under runs/."
        )
    if eval_only:
        _check_evaluation(config, run_dir)
    elif run_dir is not None and Path(run_dir).is_file():
        raise ConfigError(f"--run_dir {run_dir}: it is a file, not a folder. Give the path of a new folder.")
    if place.rank != 0:
        return Report(None, None)
    settings = config.dsaux
    environment = describe_environment(world_size=place.world_size)
    if eval_only:
        folder = open_run_folder(Path(str(run_dir)))
        folder.event("eval_only", environment=environment)
    else:
        if start is not None and start.run_dir is not None:
            lock = lock or hold_run(start.run_dir)
            folder = open_run_folder(start.run_dir)
        else:
            folder = create_run_folder(Path(run_dir) if run_dir is not None else None, settings.run.name)
            lock = hold_run(folder.path)
        folder.write_config(config.to_dict())
        folder.write_environment(environment)
    display = RunDisplay(
        name=settings.run.name,
        model=settings.model.name,
        schedule="evaluation only" if eval_only else settings.pipeline.schedule,
        stages=settings.pipeline.stages,
        replicas=place.world_size // settings.pipeline.stages,
    )
    return Report(folder, display, lock=lock)


def _check_evaluation(config: Config, run_dir: str | None) -> None:
    """Check on every rank that the folder holds a network, and that it is the configured one."""
    if run_dir is None:
        raise ConfigError("--eval_only needs --run_dir. Give the folder of a finished run.")
    path = Path(run_dir)
    check_saved_run(path)
    saved = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["dsaux"]
    given = config.to_dict()["dsaux"]
    for document in (saved, given):  # null stands for the data set's own size
        document["data"]["image_size"] = document["data"]["image_size"] or default_image_size(document["data"]["name"])
    for path_of_key in (
        "model.name",
        "model.args",
        "data.name",
        "data.image_size",
        "data.context",
        "data.test_samples",
    ):
        block, key = path_of_key.split(".")
        of_run = saved[block].get(key, given[block][key])  # an older dsaux did not have the key
        if of_run != given[block][key]:
            raise ConfigError(
                f"dsaux.{block}.{key} is {show(given[block][key])} but the run in {path} was trained with "
                f"{show(of_run)}. Evaluate it with its own configuration: --ds_config {path / CONFIG_FILE}"
            )


def _stage_row(engine: AuxPipelineEngine, *, partition: Partition, place: Place) -> StageRow:
    names = engine.module.layer_names
    total = sum(partition.stage_costs)
    return StageRow(
        rank=place.rank,
        host=place.host,
        device=str(engine.device),
        replica=int(engine.grid.get_data_parallel_rank()),
        stage=int(engine.stage_id),
        first_layer=names[0],
        last_layer=names[-1],
        parameters=sum(parameter.numel() for parameter in engine.module.parameters()),
        share=partition.stage_costs[engine.stage_id] / total if total > 0 else None,
    )
