"""The AuxNet's segment behind a stage, beside the stage's own passes (`dsaux.run.aux_stream`). Used by the local step.

Of the segments T_1 .. T_(k+1) that stage k evaluates, T_1 .. T_k make its input, and their backward pass waits for its
gradient. T_(k+1) makes the target alone, and needs of the stage nothing but X_(k+1). It has a stream of its own:

    main  | T_1 .. T_k | F_k forward     | loss | F_k backward     | T_k .. T_1 backward
    side               | T_(k+1) forward |      | T_(k+1) backward |
                       <                 >      <                  >

A pass of T_(k+1) is started (<) and awaited (>) beside a pass of the stage, between two communications of the tick: a
CUDA graph, which may begin and end where one stands (:), holds both ends of what it starts. For each micro-batch

    penalty  : AuxForward   LocalForward   PenaltyLoss     LocalBackward                     AuxBackward :
                         <             >                 <              >
    al       : AuxForward   LocalForward : LagrangianLoss : LocalBackward : RefreshVariable : AuxBackward :
                         <             >                 <              >

of which the last stage has none of it, and under `al` some ticks and micro-batches have fewer cuts. In the next
micro-batch, and in the next tick with `overlap`, the side stream starts behind all that the main one has been given. On
a CPU the order is the same without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor


class SegmentAside:
    """One segment, its graph apart from that of the segments before it.

    Args:
        segment: T_(k+1): from lambda_k, shape (B, ...), to lambda_(k+1).
        device: where it runs.
    """

    def __init__(self, segment: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._segment, self._device = segment, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def forward(self, source: Tensor) -> Tensor:
        """Start lambda_(k+1) = T_(k+1)(lambda_k); :meth:`join` before it is read.

        Args:
            source: a leaf; where it wants one, the backward pass leaves its gradient in it.
        """
        with self._aside():
            return self._segment(source)

    def backward(self, target: Tensor, force: Callable[[], Tensor]) -> None:
        """Start the backward pass of a force; :meth:`join` before gradients are read.

        Args:
            target: what :meth:`forward` has given.
            force: makes the force, of the target's shape.
        """
        with self._aside():
            torch.autograd.backward([target], [force()])

    def join(self) -> None:
        """Let the present stream wait for what has been started."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        """Within the block work goes to the side stream, behind what the present one has been given.

        Memory needs no more than that: what one stream has freed is used again on it only, and each waits for the
        other between its own uses.
        """
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)
