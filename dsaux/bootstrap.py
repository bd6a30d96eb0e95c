"""`dsaux.initialize`: `deepspeed.initialize` with our engine. Called by train.py and by users' own scripts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed
from deepspeed.accelerator import get_accelerator
from packaging.version import Version

from dsaux.config import Config, ConfigError, aux_optimizer, config_from_dict, has_aux_net, load_config
from dsaux.engine import AuxPipelineEngine
from dsaux.graph_capture import leave_default_stream
from dsaux.module import AuxPipelineModule
from dsaux.optim import stage_optimizer

MINIMUM_DEEPSPEED = "0.19.8"
_SWAP_LOCK = threading.Lock()


def initialize(
    args: Any = None,
    model: AuxPipelineModule | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[AuxPipelineEngine, Any, Any, Any]:
    """Make an :class:`~dsaux.engine.AuxPipelineEngine`; arguments and result are those of `deepspeed.initialize`.

    Args:
        args: parsed command line with `deepspeed_config`, if `config` is not given.
        model: the :class:`~dsaux.AuxPipelineModule` to train.
        optimizer: optimizer of the stages, or a callable that makes it; overrides the config's.
        model_parameters: parameters to optimize; all of the stage's by default.
        training_data: data set for DeepSpeed's own loader; usually data comes with `train_batch(data_iter)`.
        lr_scheduler: schedule of the stages, which leaves the AuxNet's rate as it is; or a callable that makes one (the
            AuxNet gets one of its own then).
        config: DeepSpeed JSON file or dict with its `dsaux` block.
        kwargs: further arguments of `deepspeed.initialize`.

    With `dsaux.run.cuda_graphs` on a GPU this thread goes on, for good, on a CUDA stream that is not the default one.

    Returns:
        (engine, optimizer, training dataloader, learning-rate schedule).

    Raises:
        ConfigError: if the configuration is wrong.
        TypeError: if `model` is not an `AuxPipelineModule`.
        RuntimeError: if DeepSpeed is older than the hooks that the engine stands on.
    """
    if Version(deepspeed.__version__) < Version(MINIMUM_DEEPSPEED):
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} is installed; dsaux needs {MINIMUM_DEEPSPEED} or newer (the pipeline "
            f"engine's schedule hooks). Run: pip install 'deepspeed>={MINIMUM_DEEPSPEED}'."
        )
    if not isinstance(model, AuxPipelineModule):
        raise TypeError(f"model is {type(model).__name__}; dsaux.initialize needs a dsaux.AuxPipelineModule.")
    settings = _read(config if config is not None else getattr(args, "deepspeed_config", None))
    if settings.deepspeed.get("scheduler", {}).get("params", {}).get("total_num_steps") == "auto":
        raise ConfigError(
            'scheduler.params.total_num_steps is "auto", which train.py alone can fill in; give the number of steps.'
        )
    # Where the module is and the engine will be. DeepSpeed does the same, but only with the engine.
    get_accelerator().set_device(model.local_rank)
    if settings.dsaux.run.cuda_graphs and get_accelerator().device_name() == "cuda":
        leave_default_stream(torch.device("cuda", model.local_rank))
    _check_trained(model, settings)
    document = settings.to_dict()
    document["optimizer"] = stage_optimizer(document["optimizer"], device_type=get_accelerator().device_name())
    # deepspeed.initialize chooses the engine by a module-level name: lend it ours for the length of the call.
    with _SWAP_LOCK:
        original = deepspeed.PipelineEngine
        deepspeed.PipelineEngine = functools.partial(
            AuxPipelineEngine, settings=settings.dsaux, aux_optimizer=_aux_optimizer(settings)
        )
        try:
            result = deepspeed.initialize(
                args=None,
                model=model,
                optimizer=optimizer,
                model_parameters=model_parameters,
                training_data=training_data,
                lr_scheduler=lr_scheduler,
                config=document,
                **kwargs,
            )
        finally:
            deepspeed.PipelineEngine = original
    set_group_timeouts(timedelta(seconds=settings.dsaux.run.timeout_s))
    block = settings.deepspeed.get("activation_checkpointing")
    if block:
        _configure_checkpointing(block)
    return result  # type: ignore[no-any-return]


def set_group_timeouts(timeout: timedelta) -> None:
    """Give every process group, DeepSpeed's own included, the run's timeout (their default is up to 30 minutes)."""
    c10d = torch.distributed.distributed_c10d
    set_timeout = getattr(torch.distributed, "set_timeout", None) or c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):
        set_timeout(timeout, group)


def _aux_optimizer(settings: Config) -> tuple[str, dict[str, Any]] | None:
    return aux_optimizer(settings) if has_aux_net(settings.dsaux) else None


def _check_trained(model: AuxPipelineModule, settings: Config) -> None:
    """Refuse, on all ranks, a stage that nothing can be trained in; a collective call."""
    is_trained = [parameter.requires_grad for parameter in model.parameters()]
    # A frozen stage may hand on the gradient of its input, where it has one; flat weights must not be empty.
    has_gradient = model.stage_id > 0 and settings.dsaux.pipeline.schedule != "local"
    is_idle = not any(is_trained) and not (is_trained and has_gradient and not settings.has_flat_weights())
    idle: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(idle, model.stage_id if is_idle else None)
    if stages := sorted({stage for stage in idle if stage is not None}):
        raise ConfigError(
            f"stage {stages[0]} has no weight to train (requires_grad is False for all of them, or there are none). "
            "Give each stage a layer that is trained: change dsaux.pipeline.partition or dsaux.pipeline.stages, or "
            "freeze fewer layers."
        )


def _configure_checkpointing(block: Mapping[str, Any]) -> None:
    # DeepSpeed's engine reads the block but leaves this call to the user's script. Of the pipeline's grid it would ask
    # for a method that the grid lacks (get_tensor_model_parallel_group); a stage has no tensor-parallel ranks.
    deepspeed.checkpointing.configure(
        None,
        partition_activations=block.get("partition_activations"),
        contiguous_checkpointing=block.get("contiguous_memory_optimization"),
        num_checkpoints=block.get("number_checkpoints"),
        checkpoint_in_cpu=block.get("cpu_checkpointing"),
        synchronize=block.get("synchronize_checkpoint_boundary"),
        profile=block.get("profile"),
    )


def _read(config: str | Path | Mapping[str, Any] | None) -> Config:
    if config is None:
        raise ConfigError(
            "no configuration was given; pass config=FILE or a dict with DeepSpeed's keys and a dsaux block."
        )
    return config_from_dict(config) if isinstance(config, Mapping) else load_config(config)
