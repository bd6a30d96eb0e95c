"""The formulas of the method as pure functions; the engine calls them, the tests check them one by one.

Symbols (docs/design.md): ``lambda_k`` is the auxiliary variable at boundary ``k``, shape (B, C_k, H_k, W_k), made by
the AuxNet; ``X_k`` is what stage ``k-1`` really makes of its own input, the same shape; ``D_k = C_k H_k W_k``.
``scale`` is ``v_k``, the running variance of ``lambda_k`` (one number per boundary), or 1 for the unscaled form: it
stands beside ``D_k`` in every formula and makes ``beta`` and ``rho`` independent of the size of the activations.

Source of the method: Sun et al., arXiv:2112.05387. The coefficients and the scaling are this project's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VARIANCE_MOMENTUM = 0.98
"""Share of the old value that a step leaves in a boundary's running variance."""


def coupling_loss(output: Tensor, target: Tensor, *, beta: float, scale: Tensor | float) -> Tensor:
    """Local loss of a stage: ``beta / (2 D v) * mean_b ||X - target||^2``.

    ``1/D * mean over samples of a squared norm`` is the mean over all entries of the tensor.

    Args:
        output: ``X_(k+1)``, what the stage made of its input, shape (B, ...).
        target: ``lambda_(k+1)`` for the penalty method, the refreshed variable for the augmented Lagrangian method.
            No gradient flows into it.
        beta: coupling of the stages, above 0.
        scale: ``v_(k+1)``, or 1.

    Returns:
        A scalar; summed in float32 when the stage computes in lower precision.
    """
    loss: Tensor = _HalfSquare.apply(output, target.detach(), beta / (scale * output.numel()))
    return loss


class _HalfSquare(torch.autograd.Function):
    """`0.5 * factor * ||output - target||^2`, with as few passes over the batch as there can be.

    Like `mse_loss`, whose backward pass would read the target again: its memory may hold the next message by then.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, factor: Tensor | float) -> Tensor:
        difference = _at_least_float32(output) - _at_least_float32(target)
        ctx.save_for_backward(difference)
        ctx.factor, ctx.dtype = factor, output.dtype
        return 0.5 * factor * difference.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (ctx.factor * gradient)).to(ctx.dtype), None, None


def match_force(target: Tensor, output: Tensor, *, rho: float, scale: Tensor | float) -> Tensor:
    """Force on the AuxNet at a boundary's tap: ``rho / (D v) * (lambda - X) / B``.

    It is the gradient, by ``lambda``, of ``rho / (2 D v) * mean_b ||lambda - X||^2``; pushed back through the AuxNet it
    makes the AuxNet follow what the stages really produce.

    Args:
        target: ``lambda_(k+1)``, shape (B, ...).
        output: ``X_(k+1)``, same shape.
        rho: coupling of the AuxNet, 0 or above.
        scale: ``v_(k+1)``, or 1.

    Returns:
        The force, shape and precision of ``target``.
    """
    target = target.detach()
    difference = _at_least_float32(target) - _at_least_float32(output.detach())
    return difference.mul_(rho / (target.numel() * scale)).to(target.dtype)


def task_force(input_gradient: Tensor, *, gamma: float) -> Tensor:
    """Force on the AuxNet at the tap of a stage's own input: ``gamma * g_k``.

    Args:
        input_gradient: ``g_k``, gradient of the stage's mean local loss by its input, shape (B, ...).
        gamma: weight of the task gradient in the AuxNet, 0 or above.

    Returns:
        The force, same shape.
    """
    return gamma * input_gradient.detach()


def refreshed_variable(variable: Tensor, input_gradient: Tensor, *, beta: float, scale: Tensor | float) -> Tensor:
    """Refreshed auxiliary variable: ``lambda' = lambda - (D v / beta) * B * g``.

    Fed as the target of :func:`coupling_loss` it gives the stage before it the gradient
    ``beta / (D v) * (X - lambda) / B + g`` by its output: with a perfect AuxNet (``lambda = X``) exactly what
    back-propagation would hand down.

    Args:
        variable: ``lambda_k``, shape (B, ...).
        input_gradient: ``g_k`` of the mean local loss of the stage that takes ``lambda_k``, same shape.
        beta: coupling of the stages, above 0.
        scale: ``v_k``, or 1; both sides of the boundary must use the same.

    Returns:
        ``lambda'_k``, same shape, in float32 when the network computes in lower precision.
    """
    variable, input_gradient = _at_least_float32(variable.detach()), _at_least_float32(input_gradient.detach())
    return variable - (variable.numel() * scale / beta * input_gradient).to(variable.dtype)


def adjoint_ratio(target: Tensor, refreshed: Tensor, output: Tensor) -> Tensor:
    """Norm of the adjoint over the norm of the coupling force, ``||lambda - lambda'|| / ||X - lambda||``.

    Both are parts of the gradient that a stage gets by its output; well above 1 the stage follows the task, well below
    1 the AuxNet.

    Args:
        target: ``lambda_(k+1)``, shape (B, ...).
        refreshed: ``lambda'_(k+1)``, same shape.
        output: ``X_(k+1)``, same shape.

    Returns:
        A scalar without a graph.
    """
    target = _at_least_float32(target.detach())
    coupling = (_at_least_float32(output.detach()) - target).square_().sum()
    adjoint = (target - _at_least_float32(refreshed.detach())).square_().sum()
    return adjoint.sqrt() / coupling.sqrt().clamp_min(torch.finfo(coupling.dtype).eps)


def relative_mismatch(target: Tensor, output: Tensor) -> Tensor:
    """``||X - lambda||^2 / (n Var(X))`` over all ``n`` entries: 0 is a perfect match, 1 no better than a constant.

    Args:
        target: ``lambda_(k+1)``, shape (B, ...).
        output: ``X_(k+1)``, same shape.

    Returns:
        A scalar without a graph.
    """
    output = _at_least_float32(output.detach())
    difference = output - _at_least_float32(target.detach())
    return difference.square_().mean() / batch_variance(output).clamp_min(torch.finfo(output.dtype).tiny)


def batch_variance(variable: Tensor) -> Tensor:
    """Variance of all entries of a batch of activations, a scalar without a graph (population variance)."""
    variable = _at_least_float32(variable.detach())
    return (variable - variable.mean()).square_().mean()  # `Tensor.var` takes thrice as long on a CPU


def updated_variance(running: Tensor, batch: Tensor) -> Tensor:
    """Running variance after a step: ``0.98 v + 0.02 var``; NaN stands for "none yet" and takes the batch's value.

    Args:
        running: ``v`` of all boundaries, shape (K-1,).
        batch: this step's variances, averaged over micro-batches and replicas, same shape.

    Returns:
        The new ``v``, same shape.
    """
    mixed = VARIANCE_MOMENTUM * running + (1.0 - VARIANCE_MOMENTUM) * batch
    return torch.where(running.isnan(), batch, mixed)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
