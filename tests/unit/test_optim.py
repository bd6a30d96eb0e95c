"""The AuxNet's optimizer and the learning rate of exact last epochs."""

from __future__ import annotations

import pytest
import torch

from dsaux.optim import CosineTail, make_aux_optimizer


def parameter() -> torch.Tensor:
    return torch.nn.Parameter(torch.ones(2))


def test_the_named_optimizer_is_built_with_its_parameters() -> None:
    optimizer = make_aux_optimizer([parameter()], "SGD", {"lr": 0.3, "momentum": 0.9})
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_the_tail_falls_from_its_rate_to_zero_as_half_a_cosine() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    tail = CosineTail(optimizer, lr=0.2, num_steps=4)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(5):
        tail.step()
        rates.append(tail.get_last_lr()[0])
    assert rates == pytest.approx([0.2, 0.1 + 0.1 * 0.5**0.5, 0.1, 0.1 - 0.1 * 0.5**0.5, 0.0, 0.0])


def test_a_restored_tail_goes_on() -> None:
    first, second = (CosineTail(torch.optim.SGD([parameter()], lr=1.0), lr=lr, num_steps=4) for lr in (0.2, 0.7))
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    assert second.steps_done == 1
