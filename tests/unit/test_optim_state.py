"""Where the states of a restored optimizer lie: on the device on which it will step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsaux.optim_state import load_parameter_states, parameter_states

SAVED = {"state": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
"""Adam's, as a checkpoint has it: on the CPU."""


class FlatOptimizer:
    """DeepSpeed's wrapped optimizer as far as a state is restored: it steps one flat float32 tensor."""

    def __init__(self, parameter: Tensor) -> None:
        self.flat = torch.zeros(4, device=parameter.device)
        self.optimizer = torch.optim.Adam([self.flat])
        self.bf16_groups, self.fp32_groups_flat_partition = [[parameter]], [self.flat]
        parameter.set_full_hp_param = lambda value, key: None

    def _link_all_hp_params(self) -> None:
        """By which it is known."""

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        """DeepSpeed's map from the parameters to the flat tensor; nobody asks for it here."""


def plain(parameter: nn.Parameter) -> tuple[Any, Tensor]:
    """An optimizer, and the tensor that it steps."""
    return torch.optim.Adam([parameter]), parameter


def wrapped(parameter: nn.Parameter) -> tuple[Any, Tensor]:
    """The same for one of DeepSpeed's."""
    outer = FlatOptimizer(parameter)
    return outer, outer.flat


@pytest.mark.parametrize("make", [plain, wrapped])
@pytest.mark.parametrize("setting", ["fused", "capturable"])
def test_steps_that_are_counted_on_the_device_are_restored_there(make: Any, setting: str) -> None:
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer, stepped = make(parameter)
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.param_groups[0][setting] = True
    load_parameter_states(optimizer, [parameter], [SAVED])
    step = inner.state[stepped]["step"]
    assert (step.device.type, step.dtype, step.shape) == ("meta", torch.float32, ())
    assert inner.state[stepped]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("make", [plain, wrapped])
def test_steps_that_are_counted_on_the_host_stay_there(make: Any) -> None:
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer, stepped = make(parameter)
    load_parameter_states(optimizer, [parameter], [SAVED])
    inner = getattr(optimizer, "optimizer", optimizer)
    assert inner.state[stepped]["step"].device.type == "cpu"
    assert inner.state[stepped]["step"] is not SAVED["state"]["step"]


@pytest.mark.parametrize("make", [plain, wrapped])
def test_an_optimizer_that_has_stepped_goes_back_to_the_saved_count(make: Any) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer, stepped = make(parameter)
    inner = getattr(optimizer, "optimizer", optimizer)
    zeros = torch.zeros_like(stepped)
    inner.state[stepped] = {"step": torch.tensor(9.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    load_parameter_states(optimizer, [parameter], [SAVED])
    assert float(inner.state[stepped]["step"]) == 3.0


def test_each_group_says_for_itself_where_its_steps_are_counted() -> None:
    fused, other = (nn.Parameter(torch.zeros(2, device="meta")) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [fused]}, {"params": [other]}])
    optimizer.param_groups[0]["fused"] = True
    load_parameter_states(optimizer, [fused, other], [SAVED, SAVED])
    assert [optimizer.state[one]["step"].device.type for one in (fused, other)] == ["meta", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_fused_adam_and_one_that_is_not_go_on_from_each_other(before: bool, after: bool, dtype: torch.dtype) -> None:
    straight, resumed = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    first = torch.optim.Adam([straight], lr=0.1, fused=before)
    second = torch.optim.Adam([resumed], lr=0.1, fused=after)
    take_steps(first, straight, count=2)
    with torch.no_grad():
        resumed.copy_(straight)
    load_parameter_states(second, [resumed], parameter_states(first, [straight]))
    for optimizer, parameter in ((first, straight), (second, resumed)):
        take_steps(optimizer, parameter, count=2)
    assert float(second.state[resumed]["step"]) == 4.0
    torch.testing.assert_close(resumed, straight)


def test_a_count_that_was_a_number_goes_on_as_a_tensor_of_a_fused_optimizer() -> None:
    """DeepSpeed's own Adam counts with a number, PyTorch's fused one with a tensor."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
    load_parameter_states(optimizer, [parameter], [{"state": {**SAVED["state"], "step": 3}}])
    take_steps(optimizer, parameter, count=1)
    assert float(optimizer.state[parameter]["step"]) == 4.0


def take_steps(optimizer: torch.optim.Optimizer, parameter: Tensor, *, count: int) -> None:
    for _ in range(count):
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
