"""The formulas one by one, float64, against autograd and against back-propagation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsaux import objective

SHAPE = (4, 3, 5, 5)
D = 75


def tensors(count: int, *, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_coupling_loss_is_beta_over_2dv_times_the_mean_squared_norm() -> None:
    output, target = tensors(2)
    expected = 10.0 / (2 * D * 0.7) * (output - target).flatten(1).square().sum(dim=1).mean()
    torch.testing.assert_close(objective.coupling_loss(output, target, beta=10.0, scale=0.7), expected)


def test_no_gradient_flows_into_the_target() -> None:
    output, target = (tensor.requires_grad_() for tensor in tensors(2))
    objective.coupling_loss(output, target, beta=1.0, scale=1.0).backward()
    assert target.grad is None
    assert output.grad is not None


def test_match_force_is_the_gradient_of_the_match_term() -> None:
    output, target = tensors(2)
    target.requires_grad_()
    match = 0.5 / (2 * D * 0.7) * (target - output).flatten(1).square().sum(dim=1).mean()
    (expected,) = torch.autograd.grad(match, target)
    torch.testing.assert_close(objective.match_force(target, output, rho=0.5, scale=0.7), expected)


def test_task_force_is_gamma_times_the_gradient() -> None:
    (gradient,) = tensors(1)
    torch.testing.assert_close(objective.task_force(gradient, gamma=0.25), gradient / 4)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("beta", [1.0, 30.0])
def test_refreshed_variable_of_a_perfect_auxnet_gives_the_gradient_of_back_propagation(
    beta: float, scale: float
) -> None:
    """lambda = X, target lambda': stage k-1's coupling loss has the gradient that back-propagation hands down."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5).double(), nn.Linear(5, 4).double()
    x, labels = torch.randn(8, 6).double(), torch.randint(4, (8,))
    F.cross_entropy(second(torch.tanh(first(x))), labels).backward()
    exact = [parameter.grad.clone() for parameter in first.parameters()]

    first.zero_grad()
    made = torch.tanh(first(x))
    variable = made.detach().requires_grad_()
    F.cross_entropy(second(variable), labels).backward()
    refreshed = objective.refreshed_variable(variable, variable.grad, beta=beta, scale=scale)
    objective.coupling_loss(made, refreshed, beta=beta, scale=scale).backward()
    for parameter, expected in zip(first.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


def test_refreshed_variable_gives_the_proximal_term_besides_the_adjoint() -> None:
    output, variable, gradient = tensors(3)
    output.requires_grad_()
    refreshed = objective.refreshed_variable(variable, gradient, beta=10.0, scale=0.7)
    objective.coupling_loss(output, refreshed, beta=10.0, scale=0.7).backward()
    expected = 10.0 / (D * 0.7) * (output.detach() - variable) / SHAPE[0] + gradient
    torch.testing.assert_close(output.grad, expected)


def test_relative_mismatch_is_zero_for_a_match_and_one_for_the_mean() -> None:
    (output,) = tensors(1)
    assert objective.relative_mismatch(output, output).item() == 0.0
    mean = torch.full_like(output, output.mean().item())
    assert objective.relative_mismatch(mean, output).item() == pytest.approx(1.0)


def test_relative_mismatch_of_a_constant_output_is_finite() -> None:
    target, zeros = tensors(1)[0], torch.zeros(SHAPE)
    assert torch.isfinite(objective.relative_mismatch(zeros, zeros))
    assert objective.relative_mismatch(target.float(), zeros) > 1.0


def test_running_variance_starts_with_the_first_batch_and_then_moves_by_two_per_cent() -> None:
    first = objective.updated_variance(torch.tensor([float("nan"), 2.0]), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(first, torch.tensor([3.0, 0.98 * 2.0 + 0.02 * 4.0]))


def test_sums_of_bf16_activations_are_taken_in_float32() -> None:
    output, target = (tensor.bfloat16() for tensor in tensors(2, shape=(64, 16, 16, 16)))
    loss = objective.coupling_loss(output, target, beta=1.0, scale=1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, 0.5 * (output.double() - target.double()).square().mean().float(), rtol=1e-5, atol=0
    )
    assert objective.match_force(target, output, rho=1.0, scale=1.0).dtype == torch.bfloat16


def test_figures_of_large_bf16_activations_are_those_of_float64() -> None:
    """8 million entries that are not around zero: a running sum in bf16 would stop at 256 times its addend."""
    shape = (32, 64, 64, 64)
    generator = torch.Generator().manual_seed(3)
    output, variable, gradient = (torch.randn(shape, generator=generator).add_(1.0).bfloat16() for _ in range(3))
    refreshed = objective.refreshed_variable(variable, gradient, beta=10.0, scale=0.7)
    exact = [tensor.double() for tensor in (output, variable, gradient)]
    exact_refreshed = objective.refreshed_variable(exact[1], exact[2], beta=10.0, scale=0.7)
    pairs = {
        "coupling loss": [
            objective.coupling_loss(x, y, beta=10.0, scale=0.7) for x, y, *_ in ((output, variable), exact)
        ],
        "mismatch": [objective.relative_mismatch(y, x) for x, y, *_ in ((output, variable), exact)],
        "variance": [objective.batch_variance(y) for y in (variable, exact[1])],
        "adjoint": [
            objective.adjoint_ratio(variable, refreshed, output),
            objective.adjoint_ratio(exact[1], exact_refreshed, exact[0]),
        ],
    }
    for name, (found, expected) in pairs.items():
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-3, atol=0.0, msg=lambda text, name=name: f"{name}: {text}"
        )
    forces = (objective.match_force(x[1], x[0], rho=1.0, scale=0.7) for x in ((output, variable), exact))
    found, expected = (force.double().square().sum() for force in forces)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)  # of a sum over roundings that go both ways


def test_the_gradient_of_a_large_bf16_coupling_loss_is_that_of_float64() -> None:
    output, target = (tensor.bfloat16() for tensor in tensors(2, shape=(64, 32, 32, 32)))
    found, expected = (tensor.detach().requires_grad_() for tensor in (output, output.double()))
    objective.coupling_loss(found, target, beta=10.0, scale=0.7).backward()
    objective.coupling_loss(expected, target.double(), beta=10.0, scale=0.7).backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=2**-8, atol=0.0)  # one rounding to bf16


def test_adjoint_ratio_is_one_where_task_and_coupling_pull_alike() -> None:
    output, variable = tensors(2)
    assert objective.adjoint_ratio(variable, 2 * variable - output, output).item() == pytest.approx(1.0)
    assert objective.adjoint_ratio(variable, variable, output).item() == 0.0


def test_adjoint_ratio_is_that_of_the_two_parts_of_the_stage_s_gradient() -> None:
    output, variable, gradient = tensors(3)
    refreshed = objective.refreshed_variable(variable, gradient, beta=10.0, scale=0.7)
    coupling = 10.0 / (D * 0.7) * (output - variable) / SHAPE[0]
    expected = torch.linalg.vector_norm(gradient) / torch.linalg.vector_norm(coupling)
    assert objective.adjoint_ratio(variable, refreshed, output).item() == pytest.approx(float(expected))


def test_adjoint_ratio_of_a_perfect_match_is_finite() -> None:
    (output,) = tensors(1)
    assert torch.isfinite(objective.adjoint_ratio(output, output + 1, output))


def test_refreshed_variable_of_a_bf16_network_is_float32() -> None:
    """lambda' differs from lambda by little: rounding to bf16 would lose much of the difference."""
    variable, gradient = (tensor.bfloat16() for tensor in tensors(2))
    assert objective.refreshed_variable(variable, gradient, beta=10.0, scale=torch.tensor(0.7)).dtype == torch.float32


def test_the_backward_pass_of_the_coupling_does_not_read_the_target_again() -> None:
    """The next receive is posted between loss and backward pass, into the memory of the target."""
    output, target = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    expected = 2.0 * (output - target).detach() / 6
    loss = objective.coupling_loss(output, target, beta=2.0, scale=1.0)
    target.fill_(float("nan"))
    loss.backward()
    torch.testing.assert_close(output.grad, expected)
