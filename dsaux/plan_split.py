"""What it costs to take a backward pass apart, as zero-bubble pipelines do. Called by `dsaux.plan_measure`.

A zero-bubble schedule makes the gradient by a stage's input first and those by its weights later, when it would wait
otherwise. PyTorch's pipelines do so with two walks over the graph. What both walk is computed twice: a normalization's
backward pass makes both at once, and the walks themselves cost Python's time for each layer.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from dsaux.models.shapes import SampleSpec
from dsaux.partition import TIMED_RUNS, WARMUP_RUNS, wait_for
from dsaux.plan_workload import BackwardSplit


def measure_split(chain: nn.Module, spec: SampleSpec, *, micro_batch_size: int, device: torch.device) -> BackwardSplit:
    """Time both parts of PyTorch's against a whole backward pass, in turn; medians.

    Args:
        chain: the network, or a part of it.
        spec: one sample of its input.
        micro_batch_size: samples in the batch.
        device: where to time.

    Returns:
        The parts' shares; halves where this version of PyTorch has no such pipelines.
    """
    try:
        from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
    except ImportError:
        return BackwardSplit()
    chain = chain.to(device).train()
    whole_s: list[float] = []
    input_s: list[float] = []
    weight_s: list[float] = []
    for run in range(WARMUP_RUNS + TIMED_RUNS):
        seconds = []
        batch = spec.random(micro_batch_size, device=device)
        batch.requires_grad_(batch.is_floating_point())
        for is_whole in (True, False):
            output = chain(batch).clone()  # PyTorch's function detaches it in place, which no view allows
            gradient = torch.randn_like(output)
            wait_for(device)
            started = time.perf_counter()
            if is_whole:
                output.backward(gradient)
            elif not batch.requires_grad:  # the first stage of a network for text takes nothing apart
                return BackwardSplit()
            else:
                _, groups = stage_backward_input([output], [gradient], [batch], chain.parameters())
                wait_for(device)
                halfway = time.perf_counter()
                stage_backward_weight(chain.parameters(), groups)
                seconds.append(halfway - started)
                started = halfway
            wait_for(device)
            seconds.append(time.perf_counter() - started)
        if run >= WARMUP_RUNS:
            for figures, value in zip((whole_s, input_s, weight_s), seconds, strict=True):
                figures.append(value)
    whole = float(np.median(whole_s))
    return BackwardSplit(float(np.median(input_s)) / whole, float(np.median(weight_s)) / whole)
