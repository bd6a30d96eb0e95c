"""Links between devices, and sizes and speeds as people write them; used by `dsaux.planner` and its command."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dsaux.config_rules import ConfigError, show

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kKMGT]?)(i?)(B|bit|b)(/s|ps)?\s*")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Link:
    """What joins two devices, in each direction.

    Attributes:
        bytes_per_s: of one direction.
        latency_s: of a message, whatever its size.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def seconds(self, size: float) -> float:
        """Time of one message of so many bytes."""
        return self.latency_s + size / self.bytes_per_s

    def all_reduce_s(self, size: float, *, ranks: int) -> float:
        """Time of a ring all-reduce: 2(n-1) messages of size/n, one after the other."""
        return 0.0 if ranks == 1 or size == 0 else 2 * (ranks - 1) * self.seconds(size / ranks)


def all_reduce_bytes(size: float, *, ranks: int) -> float:
    """Bytes that all ranks of a ring all-reduce send together: each of them 2(n-1)/n of the size."""
    return 2 * (ranks - 1) * size


def parse_link(text: str, *, latency_s: float = 0.0) -> Link:
    """Read a link's speed: "25GB/s", "200 MB/s", "1000Mbit/s", "100Gbps".

    Args:
        text: a number and B/s, bit/s or bps with k, M, G or T (powers of 1000; Ki, Mi, Gi, Ti: of 1024) before it.
        latency_s: seconds of a message beside its bytes.

    Raises:
        ConfigError: if it is no speed.
    """
    match = _SIZE.fullmatch(text)
    if match is None or not match[5] or not 0 < float(match[1]) < math.inf:
        raise ConfigError(f"the link {show(text)} is no speed. Write a number and a unit, like 25GB/s or 1000Mbit/s.")
    return Link(_number_of(match) / (1 if match[4] == "B" else 8), latency_s)


def parse_memory(text: str) -> int:
    """Read a size in bytes: "80GB", "16 GiB".

    Raises:
        ConfigError: if it is none.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[5] or match[4] != "B" or not 1 <= _number_of(match) < math.inf:
        raise ConfigError(f"the memory {show(text)} is no size. Write a number and a unit, like 80GB or 16GiB.")
    return int(_number_of(match))


def _number_of(match: re.Match[str]) -> float:
    return float(match[1]) * float(1024 if match[3] else 1000) ** _POWERS[match[2]]
