"""Checks that need the model's layers or the number of processes, and the document that DeepSpeed is given.

Second step of a run's path: `dsaux.config` re-exports `check_launch` and `resolved_deepspeed`; `train.py`
calls the first once the world size is known, `dsaux.assemble` the second once the number of steps is.
`dsaux.partition` uses `partition_indices`.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsaux.config_deepspeed import warmup_steps
from dsaux.config_rules import ConfigError, join, nearest, show, suggestion
from dsaux.ds_optim_keys import GPU_OPTIMIZERS

if TYPE_CHECKING:  # dsaux.config imports this file
    from dsaux.config import Config

_METHODS = ("uniform", "parameters", "time")
_NEVER = 10**9  # steps_per_print of a run that writes its own log
_SMALLEST_MICRO_BATCH = 2
_LONGEST_NAME = 200  # bytes; file systems stop at 255, and more may follow the name
_MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


@dataclass(frozen=True)
class Launch:
    """How a configuration lies on the processes that were started.

    Attributes:
        world_size: processes.
        stages: pipeline stages.
        replicas: copies of the pipeline, world_size / stages.
        train_batch_size: samples in a step over all replicas.
        micro_batch_size: samples in a micro-batch of one replica.
        gradient_accumulation_steps: micro-batches in a step.
    """

    world_size: int
    stages: int
    replicas: int
    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def check_launch(config: Config, *, world_size: int, needs_data: bool = True, asked_by: str | None = None) -> Launch:
    """Fits a configuration to a number of processes.

    Args:
        config: the checked configuration.
        world_size: processes.
        needs_data: look for the data set's files and its loader as well; a dry run does without.
        asked_by: the option that names the processes, where they were not started.

    DeepSpeed's rules fill in what is missing of train_batch_size, train_micro_batch_size_per_gpu and
    gradient_accumulation_steps, but a division with a remainder, which DeepSpeed rounds or asserts, is
    refused. The model, the data set and the packages that the configuration asks for must exist.

    Raises:
        ConfigError: for the first thing that does not fit.
    """
    from dsaux.data import check_data_settings, check_dataset, sample_counts
    from dsaux.size_check import check_sizes

    check_sizes(config)
    check_partition(config)
    stages = config.dsaux.pipeline.stages
    if world_size < 1 or world_size % stages != 0:
        raise ConfigError(_wrong_count(world_size, stages=stages, asked_by=asked_by))
    replicas = world_size // stages
    train, micro, steps = _batch_sizes(config.deepspeed, replicas=replicas)
    if micro < _SMALLEST_MICRO_BATCH:
        _check_single_samples(config, train=train, steps=steps, replicas=replicas)
    samples, _ = sample_counts(config.dsaux.data)  # once: a data set on disk is listed for it
    check_samples(samples, train_batch_size=train)
    _check_switch(config, steps_per_epoch=samples // train)
    _check_warmup(config, steps_per_epoch=samples // train)
    (check_dataset if needs_data else check_data_settings)(config.dsaux.data)
    _check_monitors(config.deepspeed)
    _check_timers(config)
    _check_gpu_optimizer(config.deepspeed["optimizer"]["type"])
    return Launch(
        world_size=world_size,
        stages=stages,
        replicas=replicas,
        train_batch_size=train,
        micro_batch_size=micro,
        gradient_accumulation_steps=steps,
    )


def _wrong_count(world_size: int, *, stages: int, asked_by: str | None) -> str:
    """The error about a number of processes that the stages do not divide."""
    most = max(-(-world_size // stages), 3)
    counts = [str(stages * times) for times in range(most - 2, most + 1)]
    processes, were = ("process", "was") if world_size == 1 else ("processes", "were")
    if asked_by is None:
        given, mend = f"{world_size} {processes} {were} started", "Start"
    else:
        given, mend = f"{asked_by} asks for {world_size} {processes}", "Ask for"
    alone = f", such as deepspeed --num_gpus {stages} train.py ..." if asked_by is None and world_size == 1 else ""
    return (
        f"dsaux.pipeline.stages is {stages} but {given}; it must divide them."
        f" {mend} {counts[0]}, {counts[1]} or {counts[2]}{alone}, or change stages."
    )


def _check_single_samples(config: Config, *, train: int, steps: int, replicas: int) -> None:
    """Refuses micro-batches of one sample where there is a BatchNorm; the mend changes keys that were given."""
    from dsaux.models.batchnorm_use import batchnorm_owner

    owner = batchnorm_owner(config)
    if owner is None:
        return
    given = {key for key, value in config.deepspeed.items() if value is not None}
    size, total = "train_micro_batch_size_per_gpu", "train_batch_size"
    if size not in given:
        mend = f"{total} to {_SMALLEST_MICRO_BATCH * steps * replicas} or more, or take fewer steps or replicas"
    elif total not in given:
        mend = f"{size} to {_SMALLEST_MICRO_BATCH} or more"
    else:
        parts = _SMALLEST_MICRO_BATCH * replicas * (steps if "gradient_accumulation_steps" in given else 1)
        whole = -(-train // parts) * parts
        mend = f"{size} to {_SMALLEST_MICRO_BATCH}" + (f" and {total} to {whole}" if whole != train else "")
    raise ConfigError(
        f"the micro-batch of a replica has 1 sample (train_batch_size {train} over {steps} gradient accumulation steps"
        f" and {replicas} replicas); {owner}'{'' if owner.endswith('s') else 's'} BatchNorm needs at least"
        f" {_SMALLEST_MICRO_BATCH}. Set {mend}."
    )


def _check_warmup(config: Config, *, steps_per_epoch: int) -> None:
    """Refuses a warm-up that is longer than the run, where the schedule takes its length from the run."""
    params = config.deepspeed.get("scheduler", {}).get("params", {})
    if params.get("total_num_steps") != "auto":
        return
    warmup, words = warmup_steps(params)
    run = config.dsaux.run
    epochs = run.epochs - (run.exact_epochs if run.exact_lr is not None else 0)
    steps = epochs * steps_per_epoch
    steps = steps if run.max_steps is None else min(steps, run.max_steps)
    if warmup > steps:
        raise ConfigError(
            f'scheduler.params.warmup_num_steps is {words} but with total_num_steps "auto" the schedule has the'
            f" run's {steps} steps. Set warmup_num_steps to {steps} or less, or train for more steps."
        )


def _check_switch(config: Config, *, steps_per_epoch: int) -> None:
    """Refuses exact epochs that would begin when the run has ended."""
    run = config.dsaux.run
    if run.exact_epochs == 0 or run.max_steps is None:
        return
    start = (run.epochs - run.exact_epochs) * steps_per_epoch
    if run.max_steps <= start:
        raise ConfigError(
            f"dsaux.run.max_steps is {run.max_steps} but the {run.exact_epochs} exact epochs"
            " (dsaux.run.exact_epochs)"
            f" begin after step {start}. Set max_steps above {start}, or exact_epochs to 0."
        )


def _check_monitors(document: dict[str, Any]) -> None:
    for monitor in ("tensorboard", "csv_monitor"):
        for key in ("output_path", "job_name"):
            path = document.get(monitor, {}).get(key, "")
            if isinstance(path, str) and any(len(part.encode()) > _LONGEST_NAME for part in path.split("/")):
                raise ConfigError(
                    f"{join(monitor, key)} is {show(path)}; the name of a folder may have {_LONGEST_NAME} bytes."
                    " Shorten it."
                )
    for monitor, package in _MONITOR_PACKAGES.items():
        enabled = document.get(monitor, {}).get("enabled", False)
        if enabled and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{join(monitor, 'enabled')} is true but the package {package} is not installed. Install it"
                " with"
                f" pip install {package}, or set {join(monitor, 'enabled')} to false."
            )


def _check_timers(config: Config) -> None:
    """Refuses DeepSpeed's timers where DeepSpeed 0.19.8 starts one of them twice: in the backward pass of 1F1B.

    With one stage there is no such pass, so they are let through there.
    """
    pipeline, run = config.dsaux.pipeline, config.dsaux.run
    is_exact = pipeline.schedule == "1f1b" or run.exact_epochs > 0
    if not config.deepspeed.get("wall_clock_breakdown", False) or not is_exact or pipeline.stages == 1:
        return
    key = "dsaux.pipeline.schedule" if pipeline.schedule == "1f1b" else "dsaux.run.exact_epochs"
    given = pipeline.schedule if pipeline.schedule == "1f1b" else run.exact_epochs
    raise ConfigError(
        f"wall_clock_breakdown is true with {key} {show(given)}; a timer of DeepSpeed 0.19.8 stops a run by 1f1b over"
        " several stages (bwd_microstep timer has already been started). Set wall_clock_breakdown to false, or"
        f" change {key}."
    )


def _check_gpu_optimizer(name: str) -> None:
    """Refuses an optimizer that DeepSpeed has for GPUs alone where there is none."""
    if name.lower() not in {optimizer.lower() for optimizer in GPU_OPTIMIZERS}:
        return
    from deepspeed.accelerator import get_accelerator  # takes seconds, and these optimizers alone ask for it

    if get_accelerator().device_name() == "cpu":
        raise ConfigError(
            f"optimizer.type is {show(name)}, which DeepSpeed has for GPUs alone, and this machine has none. Use SGD or"
            " AdamW."
        )


def check_samples(samples: int, *, train_batch_size: int) -> None:
    """Refuses a training set that is smaller than one global batch (the last incomplete batch is dropped).

    Args:
        samples: training samples.
        train_batch_size: samples in a step over all replicas.

    Raises:
        ConfigError: names both numbers.
    """
    if samples < train_batch_size:
        raise ConfigError(
            f"dsaux.data.train_samples is {samples}, less than one global batch of {train_batch_size}"
            " (train_batch_size), so an epoch"
            f" has no step. Set train_samples to {train_batch_size} or more, or lower train_batch_size."
        )


def check_partition(config: Config) -> None:
    """Checks that the model has enough layers for the stages and that a list of cuts fits them.

    Raises:
        ConfigError: for an unknown model, too many stages, an unknown layer, or cuts that do not increase.
    """
    from dsaux.models import layer_names
    from dsaux.models.reference import is_reference, load_function

    pipeline, model = config.dsaux.pipeline, config.dsaux.model
    if is_reference(model.name):
        from dsaux.models.causality import check_network

        names = check_network(config)
    else:
        names = layer_names(model)
        if config.dsaux.data.name == "text":
            raise ConfigError(
                f'dsaux.data.name is "text" but {model.name} takes images. Set dsaux.model.name to a network for text,'
                " such as examples/gpt.py:gpt."
            )
    if pipeline.stages > len(names):
        raise ConfigError(
            f"dsaux.pipeline.stages is {pipeline.stages} but {config.dsaux.model.name} has {len(names)}"
            " layers; a stage needs at least"
            f" one. Set stages to {len(names)} or less, or take a deeper model."
        )
    if isinstance(pipeline.partition, (tuple, list)):
        partition_indices(pipeline.partition, names=names, stages=pipeline.stages)
    if is_reference(config.dsaux.aux.segment):
        load_function(config.dsaux.aux.segment, key="dsaux.aux.segment")


def check_partition_form(given: Any) -> None:
    """Checks that dsaux.pipeline.partition is a method's name or a list; the model decides about the list.

    Raises:
        ConfigError: if it is neither, with the nearest name.
    """
    if isinstance(given, (tuple, list)) or given in _METHODS:
        return
    close = nearest(given, _METHODS) if isinstance(given, str) else None
    hint = f" Did you mean {show(close)}?" if close else ""
    raise ConfigError(
        f"dsaux.pipeline.partition is {show(given)}; it must be one of"
        f" {', '.join(show(name) for name in _METHODS)} or a list of"
        f' layers that start a stage.{hint} Change it, or leave it out for the default "time".'
    )


def partition_indices(partition: Sequence[int | str], *, names: Sequence[str], stages: int) -> tuple[int, ...]:
    """Turns a partition list into layer indices.

    Args:
        partition: the layer, by index or by name, that starts each stage after the first.
        names: names of all layers in order.
        stages: number of stages K.

    Returns:
        K-1 increasing indices, each in 1 .. len(names)-1.

    Raises:
        ConfigError: for a wrong length, an unknown layer, an index out of range or cuts that do not increase.
    """
    path = "dsaux.pipeline.partition"
    if len(partition) != stages - 1:
        entries = "1 entry" if len(partition) == 1 else f"{len(partition)} entries"
        raise ConfigError(
            f"{path} has {entries} but dsaux.pipeline.stages is {stages}; it must have {stages - 1}, the"
            " layer that starts each stage"
            f" after the first. Change the list, or set stages to {len(partition) + 1}."
        )
    indices = tuple(_layer_index(f"{path}[{place}]", entry, names=names) for place, entry in enumerate(partition))
    for place in range(1, len(indices)):
        if indices[place] <= indices[place - 1]:
            raise ConfigError(
                f"{path} is {show(list(partition))}, the layers {show(list(indices))}; they must increase."
                " Sort them and drop repeats."
            )
    return indices


def _layer_index(path: str, entry: Any, *, names: Sequence[str]) -> int:
    last = len(names) - 1
    if isinstance(entry, str):
        if entry not in names:
            raise ConfigError(f"{path} is {show(entry)}, not a layer of the model. {suggestion(entry, names[1:])}")
        index = list(names).index(entry)
    elif isinstance(entry, int) and not isinstance(entry, bool):
        index = entry
    else:
        raise ConfigError(
            f"{path} is {show(entry)}; it must be a layer's index or name. Change it to one of 1 .. {last}."
        )
    if not 1 <= index <= last:
        raise ConfigError(
            f"{path} is {show(entry)}; a stage after the first must start at a layer in 1 .. {last}"
            f" ({names[1]} .. {names[last]})."
            " Change it to one of them."
        )
    return index


def _batch_sizes(document: dict[str, Any], *, replicas: int) -> tuple[int, int, int]:
    """Returns global batch, micro-batch and micro-batches in a step, by DeepSpeed's rules without their"
    " rounding."""
    train: int | None = document.get("train_batch_size")
    micro: int | None = document.get("train_micro_batch_size_per_gpu")
    steps: int | None = document.get("gradient_accumulation_steps")
    if train is None:
        assert micro is not None, "check_deepspeed asks for one of the two"
        steps = 1 if steps is None else steps
        return micro * steps * replicas, micro, steps
    if micro is None:
        steps = 1 if steps is None else steps
        return (
            train,
            _exact_share(train, steps * replicas, _product(("gradient_accumulation_steps", steps), replicas)),
            steps,
        )
    if steps is None:
        return (
            train,
            micro,
            _exact_share(train, micro * replicas, _product(("train_micro_batch_size_per_gpu", micro), replicas)),
        )
    if train != micro * steps * replicas:
        whole = micro * steps * replicas
        raise ConfigError(
            f"train_batch_size is {train} but train_micro_batch_size_per_gpu x gradient_accumulation_steps x"
            " replicas is"
            f" {micro} x {steps} x {replicas} = {whole}. Set train_batch_size to {whole}, or leave one of the"
            " three out."
        )
    return train, micro, steps


def _product(size: tuple[str, int], replicas: int) -> str:
    return f"{size[0]} x replicas = {size[1]} x {replicas} = {size[1] * replicas}"


def _exact_share(train: int, parts: int, words: str) -> int:
    if train % parts != 0:
        below = train // parts * parts
        choices = f"{below} or {below + parts}" if below else str(parts)
        raise ConfigError(
            f"train_batch_size is {train}, which is not a multiple of {words}. Set train_batch_size to"
            f" {choices}, or change the others."
        )
    return train // parts


def resolved_deepspeed(config: Config, launch: Launch, *, total_steps: int) -> dict[str, Any]:
    """Makes the document for `deepspeed.initialize`.

    Args:
        config: the checked configuration; not changed.
        launch: what `check_launch` returned.
        total_steps: optimizer steps of the whole run, in place of "total_num_steps": "auto".

    Returns:
        A new document with the batch sizes filled in, "auto" replaced, steps_per_print set and the "dsaux"
        block inside.

    Raises:
        ValueError: if `total_steps` is below 1.
    """
    if total_steps < 1:
        raise ValueError(
            f"total_steps is {total_steps}; a run has at least one step. Give the number of optimizer steps."
        )
    document = copy.deepcopy(config.to_dict())
    document["train_batch_size"] = launch.train_batch_size
    document["train_micro_batch_size_per_gpu"] = launch.micro_batch_size
    document["gradient_accumulation_steps"] = launch.gradient_accumulation_steps
    params = document.get("scheduler", {}).get("params", {})
    if params.get("total_num_steps") == "auto":
        params["total_num_steps"] = total_steps
    if document.get("steps_per_print") is None:
        timed = document.get("wall_clock_breakdown", False)
        document["steps_per_print"] = config.dsaux.run.log_every if timed else _NEVER
    return document
