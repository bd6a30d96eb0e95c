"""A digest of a batch, by which the stages of a replica notice that they do not see the same images.

The engine sends it with the AuxNet's gradients, as one float32 number per rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LARGEST_DIGEST = 2**24 - 1
"""float32 holds every whole number up to here exactly; 0 is kept for "no digest"."""


def batch_digest(inputs: Tensor, labels: Tensor) -> int:
    """Digest of the exact bytes, types and shapes of a batch: the same in every process, and for any device.

    Args:
        inputs: tensor of any type and shape.
        labels: tensor of any type and shape.

    Returns:
        A number in 1 .. 2**24 - 1. Two different batches share it with a probability of 6e-8.
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (inputs, labels):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little") % LARGEST_DIGEST + 1


class BatchGuard:
    """Collects the digests of guarded batches and compares them when all ranks of a replica have seen a batch.

    Under `al` that takes as many ticks as there are stages, under the other schedules one.

    Args:
        ranks: global ranks of this replica, by stage.
        every: steps between checks; 0 checks the first step only.
    """

    def __init__(self, ranks: Sequence[int], *, every: int) -> None:
        self.ranks, self.every = tuple(ranks), every
        self._seen: dict[int, dict[int, int]] = {}

    def is_due(self, step: int | None) -> bool:
        """Whether the batch of an optimizer step is to be compared; None stands for no batch."""
        if step is None or len(self.ranks) == 1:
            return False
        return step == 0 or (self.every > 0 and step % self.every == 0)

    def add(self, steps: Sequence[int | None], digests: Sequence[float]) -> None:
        """Take the digests of one tick.

        Args:
            steps: optimizer step that each stage took, None for a stage without a batch.
            digests: digest per global rank, 0 where a rank gave none.

        Raises:
            RuntimeError: if two ranks of the replica saw different batches in a step.
        """
        for rank, step in zip(self.ranks, steps, strict=True):
            if step is None or digests[rank] == 0:
                continue
            seen = self._seen.setdefault(step, {})
            seen[rank] = int(digests[rank])
            if len(set(seen.values())) > 1:
                listing = ", ".join(f"rank {rank}: {seen[rank]:06x}" for rank in sorted(seen))
                raise RuntimeError(
                    f"the ranks of one replica saw different batches in step {step} ({listing}). All stages must read "
                    "the same stream: same dsaux.data block and seed, same library versions, same kind of device."
                )
            if len(seen) == len(self.ranks):
                del self._seen[step]

    def state_dict(self) -> dict[int, dict[int, int]]:
        """Digests of the batches that some ranks have yet to see, by step and rank."""
        return {step: dict(seen) for step, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[int, Mapping[int, int]]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._seen = {step: dict(seen) for step, seen in state.items()}
