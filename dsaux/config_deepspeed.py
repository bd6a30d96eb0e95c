"""Checks of DeepSpeed's own part of the configuration.

`dsaux.config` calls `check_deepspeed` while it loads a document, before any process group exists. Names and
values come from the tables `dsaux.ds_keys` and `dsaux.ds_optim_keys`; here are the checks that look at more
than one key.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from dsaux.config_rules import (
    ConfigError,
    Rule,
    check_block,
    check_names,
    check_value,
    join,
    show,
    suggestion,
)
from dsaux.ds_keys import TOP_LEVEL_KEYS
from dsaux.ds_optim_keys import (
    ADAFACTOR_EPS,
    ADAFACTOR_EPS_PAIR,
    AMSGRAD_REFUSED,
    DEEPSPEED_OPTIMIZERS,
    DEFAULT_WARMUP_STEPS,
    LEAST_WARMUP_STEPS,
    OPTIMIZER_PARAM_RULES,
    OPTIMIZER_SWITCHES,
    REFUSED_OPTIMIZERS,
    SCHEDULER_ORDER,
    SCHEDULER_REQUIRED,
    SCHEDULERS,
    TORCH_OPTIMIZERS,
    TORCH_PARAMS_OF_ALL,
    ZERO_TESTED_OPTIMIZERS,
)

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")
_DEFAULT_CLIPPING = 1.0  # DeepSpeed clips at 1 when the key is absent


def check_deepspeed(document: Mapping[str, Any], *, stages: Any, partition: Any) -> None:
    """Checks everything outside the "dsaux" block.

    Args:
        document: plain JSON document without its "dsaux" block.
        stages: value of dsaux.pipeline.stages, which DeepSpeed's pipeline block must not contradict.
        partition: value of dsaux.pipeline.partition as in JSON, likewise.

    Raises:
        ConfigError: for the first key that is unknown, unusable, wrong, or in contradiction to another one.
    """
    _check_both_precisions(document)
    check_block("", document, TOP_LEVEL_KEYS)
    _check_batch_sizes_given(document)
    if "optimizer" not in document:
        example = '"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}'
        raise ConfigError(f"optimizer is missing; the stages need one. Add {example}.")
    check_optimizer("optimizer", document["optimizer"])
    _check_scheduler(document.get("scheduler"))
    _check_zero(document)
    _check_bf16(document)
    _check_data_types(document)
    _check_pipeline_block(document.get("pipeline", {}), stages=stages, partition=partition)


def _check_both_precisions(document: Mapping[str, Any]) -> None:
    """Runs before the tables, so that two precisions at once are named as such and not as an unusable"
    " fp16."""
    if "bf16" in document and "bfloat16" in document:
        raise ConfigError("bf16 and bfloat16 are both given; they are two names of one block. Keep bf16.")
    for name in ("bf16", "bfloat16"):
        if _enabled(document.get(name)) and _enabled(document.get("fp16")):
            raise ConfigError(
                f"{name}.enabled and fp16.enabled are both true; one precision is allowed. Remove the fp16 block."
            )


def _enabled(block: Any) -> bool:
    return isinstance(block, dict) and block.get("enabled") is True


def _check_batch_sizes_given(document: Mapping[str, Any]) -> None:
    if all(document.get(key) is None for key in _BATCH_KEYS):
        raise ConfigError(
            "train_batch_size and train_micro_batch_size_per_gpu are both missing; DeepSpeed needs one of"
            " them."
            " Set train_batch_size, the number of samples in a step over all replicas."
        )


def check_optimizer(path: str, block: Mapping[str, Any], *, torch_only: bool = False) -> None:
    """Checks an optimizer block: {"type": name, "params": {...}}.

    Args:
        path: where the block stands, for the errors.
        block: a JSON object whose values are of the right kind.
        torch_only: only names of torch.optim are allowed (the AuxNet's optimizer is not built by DeepSpeed).

    Raises:
        ConfigError: for an unknown type, an unknown parameter or a value out of range.
    """
    name = _optimizer_name(join(path, "type"), block.get("type"), torch_only=torch_only)
    params = block.get("params", {})
    params_path = join(path, "params")
    if "max_grad_norm" in params:
        raise ConfigError(
            f"{params_path}.max_grad_norm is not supported. Remove it and set the top-level gradient_clipping."
        )
    fused = not torch_only and _is_fused(name, params)
    allowed = list(DEEPSPEED_OPTIMIZERS[name]) if fused else _torch_parameters(name, params)
    if not torch_only and name in ("Adam", "AdamW"):
        allowed += [switch for switch in OPTIMIZER_SWITCHES if switch not in allowed]
    check_names(params_path, params, allowed)
    for key, value in params.items():
        check_value(
            join(params_path, key),
            value,
            _parameter_rule(name, key, fused=fused),
            default="the optimizer's default",
        )
    _check_optimizer_pairs(params_path, params)
    if name == "Adafactor" and "eps" in params:
        _check_adafactor_eps(join(params_path, "eps"), params["eps"])


def _optimizer_name(path: str, given: Any, *, torch_only: bool) -> str:
    """Returns the table's spelling of an optimizer's name."""
    known = list(TORCH_OPTIMIZERS)
    if not torch_only:
        known += [name for name in DEEPSPEED_OPTIMIZERS if name not in known]
    if not isinstance(given, str):
        what = "missing" if given is None else show(given)
        raise ConfigError(
            f"{path} is {what}; it must be the name of an optimizer. Set it to one of {', '.join(known)}."
        )
    for refused, why in REFUSED_OPTIMIZERS.items():
        if given.lower() == refused.lower():
            raise ConfigError(f"{path} is {show(given)}, which dsaux does not support: {why}")
    if given in known:
        return given
    if not torch_only:
        # DeepSpeed lowers the case for its own optimizers and for Adagrad, and for no others
        for name in (*DEEPSPEED_OPTIMIZERS, "Adagrad"):
            if given.lower() == name.lower():
                return name
    raise ConfigError(f"{path} is {show(given)}, not an optimizer that dsaux knows. {suggestion(given, known)}")


def _is_fused(name: str, params: Mapping[str, Any]) -> bool:
    """Tells whether DeepSpeed would build an optimizer of its own, not one of torch.optim."""
    return name in DEEPSPEED_OPTIMIZERS and not (name in ("Adam", "AdamW") and params.get("torch_adam") is True)


def _torch_parameters(name: str, wanted: Iterable[str]) -> list[str]:
    """Returns the parameters of an optimizer of torch.optim.

    PyTorch, which takes seconds to import, is asked only if `wanted` goes beyond the parameters that every
    version has.
    """
    common = [*TORCH_OPTIMIZERS[name], *TORCH_PARAMS_OF_ALL]
    if set(wanted) <= {*common, *OPTIMIZER_SWITCHES}:
        return common
    import torch

    names = list(inspect.signature(getattr(torch.optim, name).__init__).parameters)
    return [parameter for parameter in names if parameter not in ("self", "params")]


def _parameter_rule(name: str, key: str, *, fused: bool) -> Rule:
    if name == "Adafactor" and key == "eps":
        return ADAFACTOR_EPS
    if fused and key == "amsgrad":
        return AMSGRAD_REFUSED
    return OPTIMIZER_PARAM_RULES.get(key, Rule("any"))


def _check_optimizer_pairs(path: str, params: Mapping[str, Any]) -> None:
    if params.get("nesterov") is True and (not params.get("momentum") or params.get("dampening")):
        raise ConfigError(
            f"{path}.nesterov is true with momentum {show(params.get('momentum', 0))} and dampening"
            f" {show(params.get('dampening', 0))}; it needs momentum > 0 and no dampening. Set momentum, or"
            " nesterov to false."
        )
    etas = params.get("etas")
    if etas is not None and not etas[0] < 1 < etas[1]:
        raise ConfigError(
            f"{path}.etas is {show(etas)}; the first must be < 1 and the second > 1. Change it to [0.5, 1.2]."
        )

    if params.get("fused") is True and params.get("foreach") is True:
        raise ConfigError(
            f"{path}.fused and {path}.foreach are both true; they are two ways to take a step. Set one of them to"
            " false."
        )
    betas = params.get("betas")
    if betas is not None and not all(isinstance(beta, float) for beta in betas):
        floats = show([float(beta) for beta in betas])
        raise ConfigError(
            f"{path}.betas is {show(betas)}; PyTorch takes no whole numbers there. Change it to {floats}."
        )


def _check_adafactor_eps(path: str, eps: Any) -> None:
    is_pair = isinstance(eps, list) and len(eps) == 2
    if not is_pair or not all(rule.allows(value) for rule, value in zip(ADAFACTOR_EPS_PAIR, eps, strict=True)):
        raise ConfigError(
            f"{path} is {show(eps)}; it must be {ADAFACTOR_EPS.describe()}, both >= 0. Change it to [null, 0.001]."
        )


def torch_optimizer_of(block: Mapping[str, Any], *, path: str) -> tuple[str, dict[str, Any]]:
    """Finds the optimizer of torch.optim that does the same as an optimizer block of DeepSpeed.

    Args:
        block: optimizer block that `check_optimizer` has let through.
        path: where the block stands, for the error.

    Returns:
        The name in torch.optim and its parameters. DeepSpeed's "Adam" is AdamW unless "adam_w_mode" is false.

    Raises:
        ConfigError: if torch.optim has no such optimizer, with the advice to set dsaux.aux.optimizer.
    """
    name = _optimizer_name(join(path, "type"), block.get("type"), torch_only=False)
    params = dict(block.get("params", {}))
    mend = 'Set dsaux.aux.optimizer, such as {"type": "AdamW", "params": {"lr": 0.001}}.'
    if name not in TORCH_OPTIMIZERS:
        raise ConfigError(f"{path}.type is {show(name)}, which torch.optim cannot build for the AuxNet. {mend}")
    if name in ("Adam", "AdamW"):
        if params.pop("bias_correction", True) is False:
            raise ConfigError(
                f"{path}.params.bias_correction is false, which torch.optim cannot do for the AuxNet. {mend}"
            )
        if params.get("adam_w_mode", True):
            name = "AdamW"
        for key in (*OPTIMIZER_SWITCHES, "set_grad_none"):
            params.pop(key, None)
        # DeepSpeed's fused Adam decays by 0 unless told to, torch's AdamW by 0.01
        params.setdefault(
            "weight_decay", 0.01 if block.get("params", {}).get("torch_adam") and name == "AdamW" else 0.0
        )
    return name, params


def _check_scheduler(block: Mapping[str, Any] | None) -> None:
    if block is None:
        return
    given = block.get("type")
    if not isinstance(given, str) or given not in SCHEDULERS:
        what = "missing" if given is None else f"{show(given)}, not a learning-rate schedule that dsaux knows"
        raise ConfigError(f"scheduler.type is {what}. {suggestion(str(given), SCHEDULERS)}")
    if "params" not in block:
        raise ConfigError(
            'scheduler.params is missing; DeepSpeed needs the block, if only an empty one. Add "params": {}.'
        )
    params = block["params"]
    path = "scheduler.params"
    check_block(path, params, SCHEDULERS[given])
    for key, mend in SCHEDULER_REQUIRED.get(given, {}).items():
        if key not in params:
            raise ConfigError(f"{path}.{key} is missing; {given} needs it. {mend}")
    for low, high in SCHEDULER_ORDER:
        if _is_above(params.get(low), params.get(high)):
            raise ConfigError(
                f"{path}.{low} is {show(params[low])}, above {high}, which is {show(params[high])}. Swap or"
                " change them."
            )
    total, (warmup, words) = params.get("total_num_steps"), warmup_steps(params)
    if isinstance(total, int) and warmup > total:
        raise ConfigError(
            f"{path}.warmup_num_steps is {words}, above total_num_steps, which is {show(total)}. Set warmup_num_steps"
            f" to {show(total)} or less, or total_num_steps to {show(warmup)} or more."
        )


def warmup_steps(params: Mapping[str, Any]) -> tuple[int, str]:
    """Steps of warm-up that DeepSpeed makes of a schedule's parameters, and what they are in words."""
    given: int | None = params.get("warmup_num_steps")
    if given is None:
        return DEFAULT_WARMUP_STEPS, f"missing and {DEFAULT_WARMUP_STEPS} by default"
    if given < LEAST_WARMUP_STEPS:
        return LEAST_WARMUP_STEPS, f"{given}, which DeepSpeed takes as {LEAST_WARMUP_STEPS}"
    return given, show(given)


def _is_above(low: Any, high: Any) -> bool:
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high


def _check_zero(document: Mapping[str, Any]) -> None:
    zero = document.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    name = _optimizer_name("optimizer.type", document["optimizer"]["type"], torch_only=False)
    if stage == 1 and name not in ZERO_TESTED_OPTIMIZERS and not document.get("zero_allow_untested_optimizer", False):
        raise ConfigError(
            f"zero_optimization.stage is 1 with optimizer.type {show(name)}, which DeepSpeed has not tested"
            " with ZeRO."
            " Set zero_allow_untested_optimizer to true, or the stage to 0."
        )
    if zero.get("compute_grad_norm", True) is False:
        _check_without_grad_norm(stage, clipping=document.get("gradient_clipping", _DEFAULT_CLIPPING))


def _check_without_grad_norm(stage: int, *, clipping: float) -> None:
    key = "zero_optimization.compute_grad_norm is false"
    if stage != 1:
        raise ConfigError(
            f"{key} with zero_optimization.stage {stage}; it needs stage 1. Set the stage to 1, or remove the key."
        )
    if clipping > 0:
        raise ConfigError(
            f"{key} with gradient_clipping {clipping:g}; clipping needs the norm. Set gradient_clipping to 0."
        )


def _check_bf16(document: Mapping[str, Any]) -> None:
    name = "bf16" if "bf16" in document else "bfloat16"
    block = document.get(name, {})
    low_precision = block.get("bf16_master_weights_and_grads", False)
    if low_precision and document.get("zero_optimization", {}).get("stage", 0) != 1:
        raise ConfigError(
            f"{name}.bf16_master_weights_and_grads is true without ZeRO. Set zero_optimization.stage to 1, or"
            " remove it."
        )
    if block.get("bf16_optimizer_states", False) and not low_precision:
        raise ConfigError(
            f"{name}.bf16_optimizer_states is true without {name}.bf16_master_weights_and_grads. Set both to"
            " true, or remove it."
        )


def _check_data_types(document: Mapping[str, Any]) -> None:
    types = document.get("data_types", {})
    bf16 = any(_enabled(document.get(name)) for name in ("bf16", "bfloat16"))
    model = "bf16" if bf16 else "fp32"
    params, sums = types.get("param_dtype"), types.get("grad_accum_dtype")
    if params not in (None, model):
        raise ConfigError(
            f"data_types.param_dtype is {show(params)} but the weights are {model}, as the bf16 block says."
            " Remove it and set bf16.enabled."
        )
    zero = document.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0 and sums not in (None, model):
        raise ConfigError(
            f"data_types.grad_accum_dtype is {show(sums)} with {model} weights and without ZeRO, which"
            " DeepSpeed"
            " cannot do. Set zero_optimization.stage to 1, or remove it."
        )
    if bf16 and sums == "fp32" and zero.get("compute_grad_norm", True) is False:
        raise ConfigError(
            "zero_optimization.compute_grad_norm is false with bf16 weights and data_types.grad_accum_dtype"
            ' "fp32", which DeepSpeed cannot do. Remove one of the two.'
        )


def _check_pipeline_block(block: Mapping[str, Any], *, stages: Any, partition: Any) -> None:
    """DeepSpeed reads neither key, so a value other than dsaux's own would be silently wrong."""
    for key, own, neutral in (("stages", stages, "auto"), ("partition", partition, "best")):
        if key in block and block[key] not in (own, neutral):
            raise ConfigError(
                f"pipeline.{key} is {show(block[key])} but dsaux.pipeline.{key} is {show(own)}; DeepSpeed"
                " does not read the first."
                f" Remove pipeline.{key} and keep dsaux.pipeline.{key}."
            )
