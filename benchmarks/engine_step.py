"""The engine itself with and without CUDA graphs, in one process; used by `benchmarks/device.py` where DeepSpeed is.

One stage under `penalty`: no AuxNet and no neighbour, but DeepSpeed's forward and backward passes, its optimizers and
the engine's own instructions, replayed between the loads of two micro-batches.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from device_plan import Network
from stage_step import NUM_BATCHES, SGD, deterministic_kernels
from torch import Tensor

from dsaux.rendezvous import free_port

MICRO_BATCHES = 2


def compare(
    network: Network,
    *,
    precision: str,
    steps: int,
    device: torch.device,
    time_blocks: Callable[[Callable[[int], Any]], list[float]],
) -> dict[str, Any]:
    """Losses and times of both.

    Args:
        network: cut into one stage.
        precision: "fp32" or "bf16".
        steps: of the comparison.
        device: where.
        time_blocks: measures a call.

    Returns:
        Largest difference of the losses, what the engine said, seconds of a `train_batch` of both.

    Raises:
        ImportError: if DeepSpeed is missing.
    """
    _start(device)
    found: dict[bool, list[float]] = {}
    times: dict[bool, list[float]] = {}
    told: list[str] = []
    forms = 0
    for has_graphs in (False, True):
        with deterministic_kernels():
            engine = _build(network, precision, has_graphs=has_graphs, told=told)
            data = _batches(network, device)
            found[has_graphs] = [float(engine.train_batch(data)) for _ in range(steps)]
        if engine.stage_graphs is not None:
            forms = len(engine.stage_graphs.graphs)
        engine = _build(network, precision, has_graphs=has_graphs, told=[])
        times[has_graphs] = time_blocks(lambda _, run=engine.train_batch, data=data: run(data))
    return {
        "first_loss": found[False][0],
        "last_loss": found[False][-1],
        "graphed_largest_difference": max(abs(a - b) for a, b in zip(found[False], found[True], strict=True)),
        "captured_forms": forms,
        "told": told,
        "eager_s": sorted(times[False]),
        "graphed_s": sorted(times[True]),
    }


def _start(device: torch.device) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["DS_ACCELERATOR"] = device.type
    from dsaux.runtime import start_process_group

    start_process_group(timeout_s=60.0)


def _build(network: Network, precision: str, *, has_graphs: bool, told: list[str]) -> Any:
    from dsaux.assemble import cross_entropy
    from dsaux.bootstrap import initialize
    from dsaux.module import AuxPipelineModule

    module = AuxPipelineModule(network.layers, num_stages=1, bounds=network.bounds, loss_fn=cross_entropy)
    document: dict[str, Any] = {
        "train_batch_size": network.batch,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 5.0,
        "optimizer": {"type": "SGD", "params": dict(SGD)},
        "steps_per_print": 10**9,
        "dsaux": {
            "pipeline": {"stages": 1, "schedule": "penalty"},
            "data": {"loader": "torch"},
            "run": {"cuda_graphs": has_graphs},
        },
    }
    if precision == "bf16":
        document["bf16"] = {"enabled": True}
    engine, _, _, _ = initialize(model=module, config=document)
    if engine.stage_graphs is not None:
        engine.stage_graphs.tell = told.append
    return engine


def _batches(network: Network, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    size = network.batch // MICRO_BATCHES
    shape = (size, 3, network.image_size, network.image_size)
    pairs = [
        (torch.randn(shape, generator=draw), torch.randint(network.num_classes, (size,), generator=draw))
        for _ in range(NUM_BATCHES * MICRO_BATCHES)
    ]
    return itertools.cycle([(inputs.to(device), labels.to(device)) for inputs, labels in pairs])
