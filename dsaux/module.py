"""The network of one run: the layers of this rank's stage and a replica of the AuxNet.

Stands between the models (lists of named layers) and the engine: `AuxPipelineModule` is DeepSpeed's `PipelineModule`,
cut at the bounds that `dsaux.partition` chose, with the AuxNet at its side.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dsaux.models import Layer, build_layer
from dsaux.models.auxnet import AuxNet

AUX_FILE = "aux_net-model_states.pt"
ModuleT = TypeVar("ModuleT", bound="AuxPipelineModule")


class NamedLayerSpec(LayerSpec):  # type: ignore[misc]
    """A named layer that is built only on the rank that owns it, with weights that depend on seed and index alone."""

    def __init__(self, layer: Layer, index: int, *, seed: int) -> None:
        super().__init__(nn.Module)
        self.layer, self.index, self.seed = layer, index, seed

    def __repr__(self) -> str:
        return self.layer.name

    def build(self, log: bool = False) -> nn.Module:
        return build_layer(self.layer, self.index, seed=self.seed)


class AuxPipelineModule(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's `PipelineModule` with explicit bounds and an AuxNet.

    The AuxNet is kept out of `parameters()`: every rank holds the whole of it, it steps by its own optimizer and its
    gradients are summed over all ranks, while DeepSpeed's optimizer, ZeRO and reductions see the stage's layers only.

    Args:
        layers: the network as a list of `dsaux.models.Layer`, DeepSpeed `LayerSpec`, modules or callables.
        num_stages: number K of pipeline stages; must divide the number of processes.
        loss_fn: `loss_fn(outputs, labels) -> scalar`, mean over the batch.
        bounds: K+1 layer indices, 0 first and the number of layers last; None lets DeepSpeed's `partition_method` cut.
        aux_net: the AuxNet for these bounds; None for K = 1 or a run with the 1f1b schedule alone.
        seed: seed of the weights of `Layer` items.
        kwargs: further arguments of `PipelineModule`: `topology`, `activation_checkpoint_interval` and so on.

    Raises:
        ValueError: if the bounds do not cut the layers into K stages, or the AuxNet has another number of boundaries.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        bounds: Sequence[int] | None = None,
        aux_net: AuxNet | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        specs = [
            NamedLayerSpec(layer, index, seed=seed) if isinstance(layer, Layer) else layer
            for index, layer in enumerate(layers)
        ]
        if bounds is not None and num_stages is not None:
            _check_bounds(bounds, num_stages=num_stages, num_layers=len(specs))
        # Plain attributes: nn.Module is not initialised yet, and the AuxNet must not become a sub-module.
        self.__dict__["explicit_bounds"] = None if bounds is None else list(bounds)
        self.__dict__["aux_net"] = aux_net
        # The parent prints its partition on rank 0; the run's own rank map says the same, and more.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(specs, num_stages=num_stages, loss_fn=loss_fn, **kwargs)
        if aux_net is not None:
            if aux_net.num_boundaries != self.num_stages - 1:
                raise ValueError(
                    f"the AuxNet has {aux_net.num_boundaries} segments but {self.num_stages} stages have "
                    f"{self.num_stages - 1} boundaries; build it with dsaux.models.auxnet.build_aux_net."
                )
            aux_net.to(self._stage_device())

    @property
    def num_boundaries(self) -> int:
        """K - 1, the number of cuts between stages."""
        return int(self.num_stages) - 1

    @property
    def layer_names(self) -> list[str]:
        """Names of this stage's layers, in order."""
        return [str(spec) for spec in self._layer_specs[self._local_start : self._local_stop]]

    def _stage_device(self) -> torch.device:
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().device_name(self.local_rank))

    def _partition_layers(self, method: str = "uniform") -> None:
        if self.explicit_bounds is None:
            super()._partition_layers(method)
            return
        self.parts = list(self.explicit_bounds)
        _check_bounds(self.parts, num_stages=self.num_stages, num_layers=len(self._layer_specs))
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _apply(self: ModuleT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModuleT:
        # `.double()`, `.to(device)` and the like take the AuxNet along although it is no sub-module.
        super()._apply(fn, recurse)
        if self.aux_net is not None:
            self.aux_net._apply(fn, recurse)
        return self

    def keep_batchnorm_in_float32(self) -> None:
        """Let BatchNorm layers whose weights were cast to bf16 compute with their float32 running statistics.

        DeepSpeed casts parameters but, rightly, not buffers; PyTorch's batch norm refuses the mix.
        """
        for layer in self.modules():
            if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.weight is not None:
                layer.forward = _MixedBatchNorm(layer)  # type: ignore[method-assign, assignment]

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        """Write the stage's layer files as DeepSpeed does and, from global rank 0, the AuxNet beside them."""
        super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        if self.aux_net is not None and self.global_rank == 0:
            checkpoint_engine.makedirs(save_dir, exist_ok=True)
            checkpoint_engine.save(self.aux_net.state_dict(), os.path.join(save_dir, AUX_FILE))

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """Load the stage's layer files and the AuxNet.

        Raises:
            FileNotFoundError: if the folder has no AuxNet although this module has one.
        """
        super().load_state_dir(load_dir, checkpoint_engine, strict)
        if self.aux_net is None:
            return
        path = os.path.join(load_dir, AUX_FILE)
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was written without an AuxNet (by a 1f1b run, or by plain "
                "DeepSpeed); load it with the schedule it was written with, or start with a fresh AuxNet."
            )
        self.aux_net.load_state_dict(checkpoint_engine.load(path, map_location=self._stage_device()))


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


def _check_bounds(bounds: Sequence[int], *, num_stages: int, num_layers: int) -> None:
    increasing = all(a < b for a, b in itertools.pairwise(bounds))
    if len(bounds) != num_stages + 1 or bounds[0] != 0 or bounds[-1] != num_layers or not increasing:
        raise ValueError(
            f"bounds {list(bounds)} do not cut {num_layers} layers into {num_stages} stages; give {num_stages + 1} "
            f"increasing indices from 0 to {num_layers}, e.g. {_example_bounds(num_layers, num_stages)}."
        )


def _example_bounds(num_layers: int, num_stages: int) -> list[int]:
    return [round(stage * num_layers / num_stages) for stage in range(num_stages + 1)]
