"""Optimizer of the AuxNet, and the learning rate of exact last epochs. Used by the engine.

The stages' optimizer is DeepSpeed's affair. The AuxNet has one of its own, not partitioned by ZeRO (it is small) and
with float32 weights whatever the stages use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def make_aux_optimizer(parameters: list[Tensor], name: str, params: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build the AuxNet's optimizer.

    Args:
        parameters: the AuxNet's weights.
        name: an optimizer of `torch.optim`, as `dsaux.config.aux_optimizer` gives it.
        params: its parameters.
    """
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, **params)
    return optimizer


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
