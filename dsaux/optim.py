"""Optimizer of the AuxNet and its learning rates, those of exact last epochs, and who steps in one kernel.

Used by the engine. The stages' optimizer is DeepSpeed's affair: `dsaux.bootstrap` hands it the parameters. The AuxNet
has one of its own, not partitioned by ZeRO (it is small) and with float32 weights whatever the stages use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_FUSED = ("SGD", "Adam", "AdamW")
"""Optimizers of torch.optim that take all parameters of a group in a few kernels with `fused`."""
_RATES = ("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr")
"""Parameters of DeepSpeed's schedules that are learning rates, not ratios of one."""
RANGE_TEST_LR = 1e-3
"""Where DeepSpeed's LRRangeTest starts unless told otherwise."""


def with_fused(name: str, params: Mapping[str, Any], *, device_type: str) -> dict[str, Any]:
    """Parameters of an optimizer of `torch.optim`, with `fused` where that is sound and nobody has said otherwise.

    PyTorch's own choice on a GPU, `foreach`, starts a kernel for each operation and launches more of them. On a CPU
    nothing is added: results stay those of the version before.

    Args:
        name: in `torch.optim`.
        params: as configured; `fused` or `foreach` in it, other than null, is the user's word.
        device_type: where the weights are, such as "cuda".
    """
    is_said = any(params.get(key) is not None for key in ("fused", "foreach"))
    if device_type != "cuda" or name not in _FUSED or is_said:
        return dict(params)
    return {**params, "fused": True}


def stage_optimizer(block: Mapping[str, Any], *, device_type: str) -> dict[str, Any]:
    """DeepSpeed's optimizer block, with `fused` where DeepSpeed will build one of `torch.optim` from it.

    DeepSpeed builds "Adam" and "AdamW", in any letter case, as a fused optimizer of its own unless `torch_adam` is
    true, and takes other names from `torch.optim`, with the parameters as they stand.

    Args:
        block: {"type": name, "params": {...}}.
        device_type: where the weights are.
    """
    params = block.get("params", {})
    name = {"adam": "Adam", "adamw": "AdamW"}.get(str(block["type"]).lower(), str(block["type"]))
    if name in ("Adam", "AdamW") and not params.get("torch_adam"):
        return dict(block)
    return {**block, "params": with_fused(name, params, device_type=device_type)}


def make_aux_optimizer(parameters: list[Tensor], name: str, params: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build the AuxNet's optimizer, on a GPU a fused one where there is such.

    Args:
        parameters: the AuxNet's weights.
        name: an optimizer of `torch.optim`, as `dsaux.config.aux_optimizer` gives it.
        params: its parameters.
    """
    its = with_fused(name, params, device_type=parameters[0].device.type)
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, **its)
    return optimizer


def aux_schedule(name: str, params: Mapping[str, Any], *, lr: float, stage_lr: float) -> dict[str, Any]:
    """Parameters of DeepSpeed's schedule for an AuxNet whose optimizer has a learning rate of its own.

    A schedule that names learning rates means the stages'. All of them are taken in one proportion, so that the rates
    of AuxNet and stages are in that proportion in each step: the AuxNet's own rate is the top of its curve, as it is
    under a schedule of ratios. LRRangeTest has no top; there the proportion is that of the two optimizers' rates.

    Args:
        name: type of the schedule.
        params: its parameters, as configured.
        lr: the AuxNet's own rate.
        stage_lr: that of the stages' optimizer, which counts where the schedule names no highest rate.
    """
    top = params.get("warmup_max_lr") or params.get("cycle_max_lr") or stage_lr
    start = {"lr_range_test_min_lr": RANGE_TEST_LR} if name == "LRRangeTest" else {}
    rates = {key: lr * value / top for key, value in {**start, **params}.items() if key in _RATES and value}
    return {**params, **rates}


class CosineTail:
    """Learning rate that starts at `lr` and falls to zero as half a cosine over `num_steps` optimizer steps.

    Has the methods that DeepSpeed asks of a schedule.

    Args:
        optimizer: the (wrapped) optimizer whose groups are set.
        lr: first learning rate.
        num_steps: steps until zero.
    """

    def __init__(self, optimizer: Any, *, lr: float, num_steps: int) -> None:
        self.optimizer, self.lr, self.num_steps, self.steps_done = optimizer, lr, max(1, num_steps), 0
        self._apply()

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group for the next step."""
        progress = min(1.0, self.steps_done / self.num_steps)
        return [0.5 * self.lr * (1.0 + math.cos(math.pi * progress))] * len(self.optimizer.param_groups)

    def get_last_lr(self) -> list[float]:
        """The same as :meth:`get_lr`: rates are set as soon as they are known."""
        return self.get_lr()

    def step(self) -> None:
        """Count one optimizer step and set the next rate."""
        self.steps_done += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {"lr": self.lr, "num_steps": self.num_steps, "steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.lr, self.num_steps, self.steps_done = state["lr"], state["num_steps"], state["steps_done"]
        self._apply()

    def _apply(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
