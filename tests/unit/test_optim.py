"""The AuxNet's optimizer, learning rates and what a resume restores of them, and those of exact last epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsaux.optim import CosineTail, aux_schedule, make_aux_optimizer, stage_optimizer, with_fused
from dsaux.optim_state import group_settings, load_group_settings


def parameter() -> torch.Tensor:
    return torch.nn.Parameter(torch.ones(2))


def test_the_named_optimizer_is_built_with_its_parameters() -> None:
    optimizer = make_aux_optimizer([parameter()], "SGD", {"lr": 0.3, "momentum": 0.9})
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_on_a_gpu_an_optimizer_that_can_be_is_fused_unless_the_user_says_otherwise(name: str) -> None:
    assert with_fused(name, {"lr": 0.1}, device_type="cuda") == {"lr": 0.1, "fused": True}
    assert with_fused(name, {"lr": 0.1, "fused": None}, device_type="cuda") == {"lr": 0.1, "fused": True}
    for said in ({"fused": False}, {"fused": True}, {"foreach": True}, {"foreach": False}):
        assert with_fused(name, said, device_type="cuda") == said
    getattr(torch.optim, name)([parameter()], **with_fused(name, {"lr": 0.1}, device_type="cuda"))  # takes the argument


@pytest.mark.parametrize(("name", "device_type"), [("SGD", "cpu"), ("AdamW", "cpu"), ("RMSprop", "cuda")])
def test_on_a_cpu_and_for_other_optimizers_nothing_is_added(name: str, device_type: str) -> None:
    assert with_fused(name, {"lr": 0.1}, device_type=device_type) == {"lr": 0.1}
    assert with_fused("SGD", {"fused": True}, device_type="cpu") == {"fused": True}


@pytest.mark.parametrize(
    ("block", "is_fused"),
    [
        ({"type": "SGD", "params": {"lr": 0.1}}, True),
        ({"type": "SGD"}, True),
        ({"type": "SGD", "params": {"foreach": True}}, False),
        ({"type": "Adam", "params": {"lr": 0.1}}, False),  # DeepSpeed's own, which is fused and does not know the word
        ({"type": "adamw", "params": {"torch_adam": False}}, False),
        ({"type": "adamw", "params": {"torch_adam": True}}, True),
        ({"type": "Adam", "params": {"torch_adam": True, "foreach": False}}, False),
        ({"type": "Lamb", "params": {}}, False),
        ({"type": "RMSprop", "params": {"lr": 0.1}}, False),
    ],
)
def test_the_stages_optimizer_is_fused_where_deepspeed_takes_it_from_pytorch(
    block: dict[str, Any], is_fused: bool
) -> None:
    found = stage_optimizer(block, device_type="cuda")
    assert found["type"] == block["type"]
    assert found.get("params", {}) == {**block.get("params", {}), **({"fused": True} if is_fused else {})}
    assert stage_optimizer(block, device_type="cpu").get("params", {}) == block.get("params", {})


def test_the_auxnets_optimizer_on_a_cpu_is_as_pytorch_chooses() -> None:
    assert make_aux_optimizer([parameter()], "SGD", {"lr": 0.1}).defaults["fused"] is None


@pytest.mark.parametrize(
    ("name", "params", "scaled"),
    [
        ("WarmupLR", {"warmup_min_lr": 0.1}, {"warmup_min_lr": 0.025}),
        ("WarmupLR", {"warmup_min_lr": 0.1, "warmup_max_lr": None}, {"warmup_min_lr": 0.025, "warmup_max_lr": None}),
        ("WarmupDecayLR", {"warmup_max_lr": 0.8, "total_num_steps": 9}, {"warmup_max_lr": 0.1, "total_num_steps": 9}),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 0.2}, {"cycle_min_lr": 0, "cycle_max_lr": 0.1}),
        ("OneCycle", {"cycle_min_lr": 0.02, "cycle_max_lr": 0.2}, {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}),
        (
            "LRRangeTest",
            {"lr_range_test_step_rate": 5.0},
            {"lr_range_test_min_lr": 25e-5, "lr_range_test_step_rate": 5},
        ),
        ("WarmupCosineLR", {"warmup_min_ratio": 0.1}, {"warmup_min_ratio": 0.1}),
    ],
)
def test_a_schedules_rates_are_scaled_for_an_auxnet_with_a_rate_of_its_own_and_nothing_else(
    name: str, params: dict[str, Any], scaled: dict[str, Any]
) -> None:
    assert aux_schedule(name, params, lr=0.1, stage_lr=0.4) == pytest.approx(scaled)


@pytest.mark.parametrize(("with_momentum", "betas"), [(True, (0.85, 0.99)), (False, (0.7, 0.9))])
def test_a_resume_restores_what_the_schedule_moves_and_takes_all_else_from_the_configuration(
    with_momentum: bool, betas: tuple[float, float]
) -> None:
    before = torch.optim.AdamW([parameter()], lr=0.3, betas=(0.85, 0.99), weight_decay=0.1, eps=1e-3)
    after = torch.optim.AdamW([parameter()], lr=0.1, betas=(0.7, 0.9), weight_decay=0.2, eps=1e-4)
    load_group_settings(after, group_settings(before), with_momentum=with_momentum)
    (group,) = after.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.3, betas, 0.2, 1e-4)


def test_a_momentum_that_the_new_optimizer_does_not_have_is_left_out() -> None:
    before, after = torch.optim.SGD([parameter()], lr=0.3, momentum=0.9), torch.optim.AdamW([parameter()], lr=0.1)
    load_group_settings(after, group_settings(before), with_momentum=True)
    assert "momentum" not in after.param_groups[0]


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
