"""Layers that sleep a set time in their forward and backward passes and compute next to nothing.

Ranks then need no cores of their own, so that the waits of real engines show on any machine.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import Tensor, nn


class Sleeper:
    """Sleeps for the layers of a rank and counts the time slept.

    Attributes:
        slept_s: seconds slept so far.
        intervals: start, end (of `time.perf_counter`, one clock for all processes of a machine) and kind of each sleep;
            who does not want them clears them.

    Args:
        forward_s: mean sleep of a layer in a forward pass, for each sample of the batch.
        backward_s: likewise in a backward pass; half for the gradient by the input, half for that by the weights.
        jitter: share by which each varies, uniformly up and down.
    """

    def __init__(self, *, forward_s: float, backward_s: float, jitter: float = 0.0) -> None:
        self.means_s, self.jitter, self.slept_s = {"forward": forward_s, "backward": backward_s}, jitter, 0.0
        self.intervals: list[tuple[float, float, str]] = []
        self._draws = {kind: random.Random() for kind in self.means_s}

    def seed(self, text: str) -> None:
        """Start the draws anew; forward and backward draw apart, so that their order makes no difference."""
        for kind, draw in self._draws.items():
            draw.seed(f"{text}/{kind}")

    def factor(self, kind: str) -> float:
        """How much longer than its mean the next "forward" or "backward" pass of a layer is; drawn."""
        return 1.0 + self._draws[kind].uniform(-self.jitter, self.jitter)

    def sleep(self, kind: str, *, samples: float) -> None:
        """Sleep for a "forward" or "backward" pass over so many samples of mean length."""
        started = time.perf_counter()
        time.sleep(samples * self.means_s[kind])
        ended = time.perf_counter()
        self.slept_s += ended - started
        self.intervals.append((started, ended, kind))


class _Sleep(torch.autograd.Function):
    """The identity; sleeps backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleeper: Sleeper, samples: float) -> Tensor:
        ctx.sleeper, ctx.samples = sleeper, samples
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.sleeper.sleep("backward", samples=ctx.samples)
        return gradient, None, None


class SleepingLayer(nn.Module):
    """A tiny layer with weights that sleeps: forward, for its input's gradient, and for its weights' gradient.

    The two halves of the backward pass are nodes of their own in the graph, so that schedules which compute the
    gradient by the weights later (zero bubble) find it to be half the work.

    Args:
        body: the layer.
        sleeper: sleeps for it.
    """

    def __init__(self, body: nn.Module, sleeper: Sleeper) -> None:
        super().__init__()
        self.body, self.sleeper = body, sleeper

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes, after the sleep."""
        self.sleeper.sleep("forward", samples=len(x) * self.sleeper.factor("forward"))
        # Drawn once, so that both halves of a pass are equally long, and in the order of the forward passes, which all
        # schedules share.
        half = 0.5 * len(x) * self.sleeper.factor("backward")
        if not x.requires_grad:
            # The first layer sleeps for its input's gradient as the others do. No weight may hang on this sleep: a
            # gradient by the weights that is computed later would repeat it.
            x = x.detach().requires_grad_()
        weights = {
            name: _Sleep.apply(weight, self.sleeper, half) if name.endswith("weight") else weight
            for name, weight in self.body.named_parameters()
        }
        asleep: Tensor = _Sleep.apply(x, self.sleeper, half)
        out: Tensor = torch.func.functional_call(self.body, weights, (asleep,))
        return out
