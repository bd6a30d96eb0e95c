"""How much memory a stage's tensors take: an estimate from the configuration, before anything is allocated.

What the allocator, the libraries and the loader take comes on top. `dsaux.dry_run` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsaux.config import Config, ConfigError, Launch, aux_optimizer
from dsaux.config_deepspeed import torch_optimizer_of
from dsaux.models.cost import Cost
from dsaux.optim import make_aux_optimizer

_FLOAT32, _BF16 = 4, 2
_MESSAGES = 2  # of the AuxNet's gradients: one is filled while the other is under way
_PROBE = 16  # numbers in a weight whose optimizer state is looked at


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank.

    Attributes:
        weights: of the stage: weights, gradients, float32 copies.
        optimizer: state of the stage's optimizer.
        activations: what the stage keeps for its backward pass, of all micro-batches that it holds at a time.
        aux_net: weights, gradients, optimizer state and activations of the AuxNet.
        messages: refreshed variables or outputs on their way, in both directions.
    """

    weights: int
    optimizer: int
    activations: int
    aux_net: int
    messages: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.activations + self.aux_net + self.messages


def stage_memory(
    config: Config, launch: Launch, *, stage: int, layers: Cost, aux_net: Cost | None, boundary_numbers: tuple[int, int]
) -> StageMemory:
    """Estimate of one stage.

    Args:
        config: the checked configuration.
        launch: stages, replicas and batch sizes.
        stage: number of the stage.
        layers: cost of its layers, and of its local head where it has one.
        aux_net: cost of the segments that it evaluates, with the parameters of the whole AuxNet; None without one.
        boundary_numbers: numbers in one sample of its input and of its output; 0 where nothing crosses.
    """
    is_bf16 = bool(config.deepspeed.get("bf16", {}).get("enabled"))
    number = _BF16 if is_bf16 else _FLOAT32
    # bf16: a float32 copy and a float32 sum of gradients beside the weights and their gradients
    weights = layers.parameters * (2 * _BF16 + 2 * _FLOAT32 if is_bf16 else 2 * _FLOAT32)
    share = launch.replicas if config.deepspeed.get("zero_optimization", {}).get("stage", 0) else 1
    schedule = config.dsaux.pipeline.schedule
    held = min(launch.gradient_accumulation_steps, launch.stages - stage) if schedule == "1f1b" else 1
    messages = 0
    if schedule in ("al", "local"):
        crossing = boundary_numbers[0] + boundary_numbers[1]
        width = _BF16 if config.dsaux.aux.transport == "bf16" else _FLOAT32
        messages = crossing * launch.micro_batch_size * launch.gradient_accumulation_steps * width
    aux_bytes = 0
    if aux_net is not None:
        states = states_per_parameter(*aux_optimizer(config))
        per_parameter = _FLOAT32 * (2 + states + _MESSAGES)
        aux_bytes = int(aux_net.parameters * per_parameter) + aux_net.saved_numbers * launch.micro_batch_size * number
    return StageMemory(
        weights=weights,
        optimizer=int(layers.parameters * _FLOAT32 * _stage_states(config) / share),
        activations=layers.saved_numbers * launch.micro_batch_size * number * held,
        aux_net=aux_bytes,
        messages=messages,
    )


def states_per_parameter(name: str, params: Mapping[str, Any]) -> float:
    """Numbers that an optimizer of torch.optim remembers for each parameter, found by one step of it.

    Args:
        name: in `torch.optim`.
        params: its parameters.
    """
    weight = torch.zeros(1, _PROBE, requires_grad=True)
    optimizer = make_aux_optimizer([weight], name, {**params, "fused": False} if "fused" in params else params)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight].values()
    tensors = [value for value in state if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(tensor.numel() for tensor in tensors) / _PROBE


def _stage_states(config: Config) -> float:
    try:
        return states_per_parameter(*torch_optimizer_of(config.deepspeed["optimizer"], path="optimizer"))
    except ConfigError:  # DeepSpeed's own: two moments, as far as they are known
        return 2.0
