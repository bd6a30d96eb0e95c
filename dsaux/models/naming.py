"""Names of the networks and of their layers; imports nothing, so that a configuration is checked in no time."""

from __future__ import annotations

import re

SMALLEST_DEPTH, LARGEST_DEPTH = 8, 1202
GROUPS = 3


def resnet_blocks(model: str) -> int | None:
    """Blocks per group n of a CIFAR residual network of depth 6n+2; None if the name is not of this kind."""
    match = re.fullmatch(r"resnet([1-9]\d{0,3})", model)
    if match is None:
        return None
    depth = int(match.group(1))
    if not SMALLEST_DEPTH <= depth <= LARGEST_DEPTH or (depth - 2) % 6:
        return None
    return (depth - 2) // 6


def nearest_resnet(model: str) -> str:
    """The valid name whose depth is nearest to the digits in a wrong one; resnet20 if there are none."""
    digits = re.search(r"\d{1,9}", model)
    if digits is None:
        return "resnet20"
    blocks = round((int(digits.group()) - 2) / 6)
    depth = 6 * blocks + 2
    return f"resnet{min(max(depth, SMALLEST_DEPTH), LARGEST_DEPTH)}"


def resnet_layer_names(blocks: int) -> list[str]:
    """Layer names of a CIFAR residual network: stem, the blocks of each group, head."""
    body = [f"group{group}.block{block}" for group in range(1, GROUPS + 1) for block in range(1, blocks + 1)]
    return ["stem", *body, "head"]
