"""Stages and AuxNet as `torch.compile` makes them (`dsaux.run.compile`). Used by the engine.

Calls are compiled, never modules wrapped: names in the state dict, checkpoints and exports stay as they are. Training
passes alone go through a compiled call: an evaluation has other batches and the re-estimation of BatchNorm other modes,
for which everything would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor

from dsaux.watch_rules import headline


class CompiledCall:
    """A function of tensors that is compiled when it is first called, and runs as it is where that fails.

    Args:
        run: the function.
        name: what it is, for the log.
        buffers: tensors that it writes to: what an attempt has written that failed half-way is taken back.

    Attributes:
        is_compiled: None before the first call.
    """

    def __init__(self, run: Callable[..., Any], *, name: str, buffers: Iterable[Tensor]) -> None:
        self._run, self._name, self._buffers = run, name, list(buffers)
        self._call = run
        self.is_compiled: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_compiled is None:
            return self._first(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        kept = [(buffer, buffer.clone()) for buffer in self._buffers]
        random_state = torch.get_rng_state()
        try:
            # Shapes are those of a micro-batch, in every step: code for shapes that vary would be slower.
            self._call = torch.compile(self._run, dynamic=False)
            result = self._call(*args, **kwargs)
        except Exception as error:  # whatever a compiler may raise; a fault of the network's own is raised again below
            self._call, self.is_compiled = self._run, False
            for buffer, value in kept:
                buffer.copy_(value)
            torch.set_rng_state(random_state)
            logger.warning(
                f"dsaux.run.compile: {self._name} runs without torch.compile, which failed: {headline(error)}"
            )
            return self._run(*args, **kwargs)
        self.is_compiled = True
        return result


def chain_of(layers: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """The layers one after the other, without what DeepSpeed's module counts beside them: that would be compiled in."""

    def chain(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    return chain
