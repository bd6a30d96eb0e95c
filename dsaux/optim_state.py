"""Optimizer state by parameter, whoever holds it: a plain optimizer, ZeRO-1, or the bf16 optimizer.

DeepSpeed's wrapped optimizers keep one flat float32 tensor per parameter group, cut over the data group. A checkpoint
that stored those could be read by as many replicas alone, and by no other cut of the network. Here they are put
together again, parameter by parameter, through DeepSpeed's own mapping, and taken apart when they are loaded. Used by
`dsaux.engine_state`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_PER_WEIGHT = (
    "master",
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "max_exp_avg_sq",
    "square_avg",
    "acc_delta",
    "grad_avg",
    "sum",
)
"""States of PyTorch's optimizers that hold a number per weight; others may have shapes of their own."""

ParameterState = dict[str, Any]
"""{"state": {key: tensor or number}} and, where the weights are not float32 themselves, "master": float32 weights."""


def parameter_states(optimizer: Any, parameters: Iterable[Tensor]) -> list[ParameterState]:
    """Optimizer state of each parameter, on the CPU; a collective of the data group where the optimizer is wrapped.

    Args:
        optimizer: a torch optimizer, DeepSpeed's ZeRO-1 or its bf16 optimizer.
        parameters: those of a stage, in an order that is the same on all replicas.

    Returns:
        One entry per parameter; "state" is empty before the first step, and of a frozen parameter.
    """
    base, stepped = base_optimizer(optimizer), _stepped(optimizer)
    found: list[ParameterState] = []
    for parameter in parameters:
        if id(parameter) not in stepped:
            found.append({"state": {}})
            continue
        if not _is_wrapped(optimizer):
            state = {key: _to_cpu(value) for key, value in base.state.get(parameter, {}).items()}
            found.append({"state": state})
            continue
        flat = _flat_partition(optimizer, parameter)
        held = base.state.get(flat, {})
        _link(optimizer, when=bool(held))
        state = {
            key: _to_cpu(parameter.get_full_hp_param(key) if _is_slice(value, flat) else value)  # type: ignore[attr-defined]
            for key, value in held.items()
        }
        found.append({"master": _to_cpu(parameter.get_full_hp_param()), "state": state})  # type: ignore[attr-defined]
    return found


def load_parameter_states(
    optimizer: Any, parameters: Iterable[Tensor], states: Iterable[ParameterState | None]
) -> None:
    """Restore what :func:`parameter_states` gave, in whatever way the optimizer holds it.

    Args:
        optimizer: as there; it must not have stepped yet, or have stepped with the same kind of state.
        parameters: as there.
        states: one entry per parameter; None for a parameter whose state starts anew.

    Raises:
        ValueError: if an entry is no state of its parameter.
    """
    base, stepped = base_optimizer(optimizer), _stepped(optimizer)
    pairs = [pair for pair in zip(parameters, states, strict=True) if id(pair[0]) in stepped]
    for parameter, entry in pairs:
        if entry is not None:
            _check(parameter, entry)
    if not _is_wrapped(optimizer):
        for parameter, entry in pairs:
            if entry is not None and entry["state"]:
                base.state[parameter] = {
                    key: _like(value, parameter) if _is_slice(value, parameter) else _other(base, parameter, key, value)
                    for key, value in entry["state"].items()
                }
        return
    for parameter, entry in pairs:
        if entry is None:
            continue
        flat = _flat_partition(optimizer, parameter)
        for key, value in entry["state"].items():
            if not _is_slice(value, parameter):
                base.state[flat][key] = _other(base, flat, key, value)
            elif key not in base.state[flat]:
                base.state[flat][key] = torch.zeros_like(flat)
    _link(optimizer, when=any(base.state.values()))
    for parameter, entry in pairs:
        if entry is None:
            continue
        # The float32 weights of a run without them are its weights.
        master = entry.get("master", parameter.detach().float())
        parameter.set_full_hp_param(master.to(parameter.device), None)  # type: ignore[attr-defined]
        for key, value in entry["state"].items():
            if _is_slice(value, parameter):
                parameter.set_full_hp_param(value.to(parameter.device), key)  # type: ignore[attr-defined]


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Learning rate, momentum and so on of each parameter group."""
    return [
        {key: _to_cpu(value) for key, value in group.items() if key != "params"}
        for group in base_optimizer(optimizer).param_groups
    ]


def cycles_momentum(scheduler: Any) -> bool:
    """Whether a schedule moves the momentum beside the learning rate, as DeepSpeed's OneCycle does with Adam's."""
    return bool(getattr(scheduler, "cycle_momentum", False))


def load_group_settings(optimizer: Any, groups: list[Mapping[str, Any]], *, with_momentum: bool) -> None:
    """Restore what a schedule had reached; all else is as the configuration says.

    Args:
        optimizer: the optimizer of the present configuration.
        groups: what :func:`group_settings` gave.
        with_momentum: the schedule moves the momentum as well (:func:`cycles_momentum`).
    """
    for group, saved in zip(base_optimizer(optimizer).param_groups, groups, strict=False):
        moved = [key for key in ("betas", "momentum") if with_momentum and key in group]
        for key in ("lr", "initial_lr", *moved):
            if key in saved:
                group[key] = saved[key]


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    inner: torch.optim.Optimizer = optimizer.optimizer if _is_wrapped(optimizer) else optimizer
    return inner


def _check(parameter: Tensor, entry: ParameterState) -> None:
    for key, value in {**entry["state"], "master": entry.get("master", parameter)}.items():
        is_fitting = _is_slice(value, parameter) or (isinstance(value, Tensor) and value.numel() == parameter.numel())
        if not isinstance(value, (Tensor, int, float)) or (key in _PER_WEIGHT and not is_fitting):
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} of {what} for a parameter of shape {tuple(parameter.shape)}")


def _is_wrapped(optimizer: Any) -> bool:
    return hasattr(optimizer, "_link_all_hp_params")


def _groups(optimizer: Any) -> list[list[Tensor]]:
    """Parameters that are stepped, by group; DeepSpeed's wrapped optimizers leave the frozen ones out."""
    if not _is_wrapped(optimizer):
        return [group["params"] for group in optimizer.param_groups]
    return getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups  # type: ignore[no-any-return]


def _stepped(optimizer: Any) -> set[int]:
    """`id` of each parameter that the optimizer holds."""
    return {id(parameter) for group in _groups(optimizer) for parameter in group}


def _flat_partition(optimizer: Any, parameter: Tensor) -> Tensor:
    """This rank's flat float32 tensor of the parameter's group."""
    flats = getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups
    for members, flat in zip(_groups(optimizer), flats, strict=True):
        if any(member is parameter for member in members):
            return flat  # type: ignore[no-any-return]
    raise AssertionError("the parameter is in a group of the optimizer")


def _link(optimizer: Any, *, when: bool) -> None:
    """Let DeepSpeed map parameters to slices of the optimizer's state, which it does with the first step."""
    if when:
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_slice(value: Any, whole: Tensor) -> bool:
    """Whether a state is one number per weight, not a count of steps."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() == whole.numel()


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, requires_grad=False).copy_(value.reshape(parameter.shape))


def _other(base: torch.optim.Optimizer, stepped: Tensor, key: str, value: Any) -> Any:
    """A state that is no number per weight, where the optimizer looks for it.

    As PyTorch's `load_state_dict` has it: where kernels read the count of steps it lies on the weights' device, in
    float32; otherwise it is the host's.
    """
    groups = (group for group in base.param_groups if any(one is stepped for one in group["params"]))
    is_read_there = any(group.get("fused") or group.get("capturable") for group in groups)
    if key == "step" and is_read_there:
        return torch.as_tensor(value).to(stepped.device, torch.float32, copy=True)
    return value.clone() if isinstance(value, Tensor) else value


def _to_cpu(value: Any) -> Any:
    # A checkpoint is the same whatever the memory format of the run that wrote it.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
