"""BatchNorm in a network whose weights were cast to bf16. Used by `dsaux.module` and the benchmarks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def keep_batchnorm_in_float32(module: nn.Module) -> None:
    """Let BatchNorm layers whose weights were cast to bf16 compute with their float32 running statistics.

    PyTorch's batch norm refuses weights and statistics of two precisions.

    Args:
        module: changed in place.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.weight is not None:
            layer.forward = _MixedBatchNorm(layer)  # type: ignore[method-assign, assignment]


class _MixedBatchNorm:
    """`forward` of a BatchNorm layer with low-precision weights and float32 running statistics."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        factor = layer.momentum
        if layer.training and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(layer.num_batches_tracked)
        return F.batch_norm(
            x,
            layer.running_mean,
            layer.running_var,
            layer.weight.float(),
            layer.bias.float(),
            layer.training,
            0.0 if factor is None else factor,
            layer.eps,
        )
