"""Names of the networks and of their layers; imports nothing, so that a configuration is checked in no time."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

SMALLEST_DEPTH, LARGEST_DEPTH = 8, 1202
SMALLEST_WIDE_DEPTH, LARGEST_WIDE_DEPTH, LARGEST_WIDENING = 10, 1000, 99
GROUPS = 3
CIFAR_PREFIX = "cifar_"
TORCHVISION_BLOCKS: Mapping[str, tuple[int, ...]] = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnext50_32x4d": (3, 4, 6, 3),
    "resnext101_32x8d": (3, 4, 23, 3),
    "resnext101_64x4d": (3, 4, 23, 3),
    "wide_resnet50_2": (3, 4, 6, 3),
    "wide_resnet101_2": (3, 4, 23, 3),
}
"""torchvision's name -> blocks in layer1 .. layer4."""


# ---- torchvision's networks -----------------------------------------------------------------------------------------


def torchvision_layer_names(model: str) -> list[str] | None:
    """Layer names of one of torchvision's networks: stem, "layer1.0" .. , head; None if the name is not one of them."""
    if model not in TORCHVISION_BLOCKS:
        return None
    counts = TORCHVISION_BLOCKS[model]
    body = [f"layer{group}.{block}" for group, count in enumerate(counts, start=1) for block in range(count)]
    return ["stem", *body, "head"]


def nearest_torchvision(model: str) -> str | None:
    """The name that differs in case or marks alone, or the nearest ResNeXt or Wide-ResNet-50/101; None for others."""
    plain = {_plain(name): name for name in TORCHVISION_BLOCKS}
    given = _plain(model)
    if given in plain:
        return plain[given]
    for kind in ("resnext", "wideresnet50", "wideresnet101"):
        if given.startswith(kind):
            close = [name for name in plain if name.startswith(kind)]
            return plain[max(close, key=lambda name: difflib.SequenceMatcher(None, given, name).ratio())]
    return None


# ---- residual networks for small images -----------------------------------------------------------------------------


def resnet_blocks(model: str) -> int | None:
    """Blocks per group n of a CIFAR residual network of depth 6n+2; None if the name is not of this kind.

    "resnet50" and "resnet152" are torchvision's; "cifar_resnet50" is of this kind.
    """
    match = re.fullmatch(rf"({CIFAR_PREFIX})?resnet([1-9]\d{{0,3}})", model)
    if match is None or model in TORCHVISION_BLOCKS:
        return None
    depth = int(match.group(2))
    if not SMALLEST_DEPTH <= depth <= LARGEST_DEPTH or (depth - 2) % 6:
        return None
    return (depth - 2) // 6


def nearest_resnet(model: str) -> str | None:
    """The residual network, torchvision's or for CIFAR, whose depth is nearest; None if the name is no such one."""
    given = _plain(model)
    digits = re.search(r"\d{1,9}", given)
    letters = given[: digits.start()] if digits else given
    prefix = CIFAR_PREFIX if "cifar" in letters else ""
    if not difflib.get_close_matches(letters.replace("cifar", ""), ["resnet"], cutoff=0.6):
        return None
    wanted = int(digits.group()) if digits else 20
    near = min(max(6 * round((wanted - 2) / 6) + 2, SMALLEST_DEPTH), LARGEST_DEPTH)
    depths = [near]
    if not prefix:
        depths += [
            int(name.removeprefix("resnet"))
            for name in TORCHVISION_BLOCKS
            if name.startswith("resnet") and name.removeprefix("resnet").isdigit()
        ]
    depth = min(depths, key=lambda candidate: abs(candidate - wanted))
    return f"{prefix}resnet{depth}"


def small_layer_names(blocks: int) -> list[str]:
    """Layer names of a network of three groups: stem, the blocks of each group, head."""
    body = [f"group{group}.block{block}" for group in range(1, GROUPS + 1) for block in range(1, blocks + 1)]
    return ["stem", *body, "head"]


# ---- wide residual networks for small images ------------------------------------------------------------------------


def wide_resnet_size(model: str) -> tuple[int, int] | None:
    """Blocks per group n and widening factor k of "wrn<6n+4>_<k>"; None if the name is not of this kind."""
    match = re.fullmatch(r"wrn([1-9]\d{1,3})_([1-9]\d?)", model)
    if match is None:
        return None
    depth, widening = int(match.group(1)), int(match.group(2))
    if not SMALLEST_WIDE_DEPTH <= depth <= LARGEST_WIDE_DEPTH or (depth - 4) % 6:
        return None
    return (depth - 4) // 6, widening


def nearest_wide_resnet(model: str) -> str | None:
    """The WideResNet of nearest depth and widening factor; None if the name is nothing like one."""
    if not re.match(r"wrn|wideres|wresnet", _plain(model)):
        return None
    numbers = [int(digits) for digits in re.findall(r"\d{1,9}", model)]
    depth, widening = (*numbers, *(28, 10)[len(numbers) :])[:2]
    depth = 6 * round((depth - 4) / 6) + 4
    depth = min(max(depth, SMALLEST_WIDE_DEPTH), LARGEST_WIDE_DEPTH)
    return f"wrn{depth}_{min(max(widening, 1), LARGEST_WIDENING)}"


def _plain(model: str) -> str:
    return re.sub(r"[^a-z0-9]", "", model.lower())
