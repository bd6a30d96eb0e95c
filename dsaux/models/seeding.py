"""Weights from a seed and a place, whoever builds them and in whatever order."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derived_seed(seed: int, kind: str, index: int) -> int:
    """A seed for PyTorch's generator that (seed, kind, index) decide."""
    digest = hashlib.blake2b(f"{seed}/{kind}/{index}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


@contextlib.contextmanager
def seeded(seed: int, kind: str, index: int) -> Iterator[None]:
    """Within the block PyTorch's CPU generator starts from (seed, kind, index); afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, kind, index))
        yield
