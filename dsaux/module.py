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

from dsaux.compiled import CompiledCall, chain_of
from dsaux.models import Layer, build_layer
from dsaux.models.auxnet import AuxNet
from dsaux.models.mixed_norm import keep_batchnorm_in_float32

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
        local_heads: K-1 heads for `schedule: local` (dsaux.models.local_heads); a stage keeps its own one, as a part of
            itself that DeepSpeed's optimizer trains along and the network does without.
        seed: seed of the weights of `Layer` items.
        kwargs: further arguments of `PipelineModule`: `topology`, `activation_checkpoint_interval` and so on.

    Raises:
        ValueError: if the bounds do not cut the layers into K stages, or AuxNet or heads are for another number of
            boundaries.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        bounds: Sequence[int] | None = None,
        aux_net: AuxNet | None = None,
        local_heads: Sequence[nn.Module] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        layers = list(layers)
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
        for layer in layers:
            if isinstance(layer, Layer) and layer.whole is not None:
                layer.whole.release()  # the other stages' layers
        if aux_net is not None:
            if aux_net.num_boundaries != self.num_stages - 1:
                raise ValueError(
                    f"the AuxNet has {aux_net.num_boundaries} segments but {self.num_stages} stages have "
                    f"{self.num_stages - 1} boundaries; build it with dsaux.models.auxnet.build_aux_net."
                )
            aux_net.to(self._stage_device())
        self.memory_format: torch.memory_format | None = None
        self.compiled: CompiledCall | None = None
        self.local_head: nn.Module | None = None
        self._has_local_heads = local_heads is not None
        if local_heads is not None:
            if len(local_heads) != self.num_boundaries:
                raise ValueError(
                    f"there are {len(local_heads)} local heads but {self.num_stages} stages have {self.num_boundaries} "
                    "boundaries; build them with dsaux.models.local_heads.build_local_heads."
                )
            if self.stage_id < self.num_boundaries:
                self.local_head = local_heads[self.stage_id].to(self._stage_device())

    @property
    def num_boundaries(self) -> int:
        """K - 1, the number of cuts between stages."""
        return int(self.num_stages) - 1

    @property
    def has_local_heads(self) -> bool:
        """Whether every stage but the last has a head of its own; the same on all ranks."""
        return bool(self._has_local_heads)

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

    def use_channels_last(self, *, weights: bool) -> None:
        """Let stage and AuxNet compute in PyTorch's channels-last memory format, from now on; values stay as they are.

        Args:
            weights: turn the stage's 4-dimensional weights as well; False where an optimizer keeps them in one flat
                tensor. Those of the AuxNet are turned always.
        """
        self.memory_format = torch.channels_last
        stage = self.parameters() if weights else ()
        aux = () if self.aux_net is None else self.aux_net.parameters()
        for parameter in itertools.chain(stage, aux):
            parameter.data = self.arrange(parameter.data)

    def arrange(self, tensor: Tensor) -> Tensor:
        """The tensor in this module's memory format; only one of 4 dimensions has another one than the usual."""
        if self.memory_format is None or tensor.ndim != 4:
            return tensor
        return tensor.contiguous(memory_format=self.memory_format)

    def compile_training(self) -> None:
        """Let training passes run through `torch.compile`, unless DeepSpeed has work of its own between the layers."""
        if self.activation_checkpoint_interval == 0 and not self.seed_layers:
            self.compiled = CompiledCall(
                chain_of(list(self.forward_funcs)), name=f"stage {self.stage_id}", buffers=self.buffers()
            )

    def forward(self, forward_input: Any) -> Any:
        """The stage's layers. To turn the input is part of the graph: its gradient has the layout of what was given."""
        its = self.arrange(forward_input) if isinstance(forward_input, Tensor) else forward_input
        if self.compiled is None or not (self.training and torch.is_grad_enabled()):
            return super().forward(its)
        return self.compiled(its)

    def keep_batchnorm_in_float32(self) -> None:
        """Let BatchNorm layers whose weights were cast to bf16 compute with their float32 running statistics.

        DeepSpeed casts parameters but, rightly, not buffers; PyTorch's batch norm refuses the mix.
        """
        keep_batchnorm_in_float32(self)

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


def _check_bounds(bounds: Sequence[int], *, num_stages: int, num_layers: int) -> None:
    increasing = all(a < b for a, b in itertools.pairwise(bounds))
    if len(bounds) != num_stages + 1 or bounds[0] != 0 or bounds[-1] != num_layers or not increasing:
        raise ValueError(
            f"bounds {list(bounds)} do not cut {num_layers} layers into {num_stages} stages; give {num_stages + 1} "
            f"increasing indices from 0 to {num_layers}, e.g. {_example_bounds(num_layers, num_stages)}."
        )


def _example_bounds(num_layers: int, num_stages: int) -> list[int]:
    return [round(stage * num_layers / num_stages) for stage in range(num_stages + 1)]
