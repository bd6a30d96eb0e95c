"""A digest of a batch, by which the stages of a replica notice that they do not see the same images.

The engine sends it with the AuxNet's gradients, as one float32 number per rank.
"""

from __future__ import annotations

import hashlib

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
