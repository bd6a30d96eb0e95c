"""What the AuxNet costs beside the network, in multiply-accumulates and parameters; nothing is run or measured.

    python benchmarks/aux_cost.py
    python benchmarks/aux_cost.py --model resnet50 --stages 2 4 --segment bottleneck --width 0.5 1 --image_size 224

Each network is cut into stages of equal multiply-accumulates, their part of the AuxNet included; a forward pass of the
whole chain of segments is held against one of the whole network.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsaux.aux_cost import AuxCost, aux_cost
from dsaux.config_rules import ConfigError, Rule
from dsaux.models import build_layers
from dsaux.models.auxnet import SEGMENTS

SMALL, LARGE = 32, 64
"""Up to LARGE pixels an image counts as CIFAR's, with 10 classes, else as ImageNet's, with 1,000."""
MOST = 100
"""Depth and width of a segment, as in a run."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    stages: int
    segment: str
    width: float
    image_size: int
    depth: int = 1

    def cost(self) -> AuxCost:
        """Count it; the errors of `aux_cost` and `build_layers`."""
        shape = (3, self.image_size, self.image_size)
        layers = build_layers(self.model, num_classes=10 if self.image_size <= LARGE else 1000, input_spec=shape)
        return aux_cost(
            layers,
            input_spec=shape,
            num_stages=self.stages,
            segment=self.segment,
            depth=self.depth,
            width=self.width,
        )


DEFAULT = (
    Case("resnet110", 3, "light", 1.0, 32),
    Case("resnet110", 4, "light", 1.0, 32),
    Case("wrn16_4", 3, "light", 1.0, 32),
    Case("wrn16_4", 3, "bottleneck", 1.0, 32),
    Case("wrn28_10", 4, "light", 1.0, 32),
    Case("wrn28_10", 4, "bottleneck", 1.0, 32),
    Case("wrn28_10", 4, "bottleneck", 2.0, 32),
    Case("resnet50", 4, "light", 1.0, 224),
    Case("resnet50", 4, "bottleneck", 0.5, 224),
    Case("resnet50", 4, "bottleneck", 1.0, 224),
    Case("resnet101", 4, "bottleneck", 0.5, 224),
    Case("resnet101", 4, "bottleneck", 1.0, 224),
)


def main() -> int:
    """Print the table; 2 if the command line names what there is not."""
    arguments = parse_arguments()
    try:
        rows = [row(case, case.cost()) for case in cases_of(arguments)]
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table(rows, markdown=arguments.markdown))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="networks (a list of well-known ones)")
    parser.add_argument("--stages", nargs="+", type=int, metavar="K", help="numbers of stages (4)")
    parser.add_argument("--segment", nargs="+", choices=SEGMENTS, help="segments (all)")
    parser.add_argument("--width", nargs="+", type=float, help="values of dsaux.aux.width (1)")
    parser.add_argument("--depth", type=int, help="dsaux.aux.depth (1)")
    parser.add_argument("--image_size", type=int, help=f"side of the images in pixels ({SMALL})")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    return parser.parse_args()


def cases_of(arguments: argparse.Namespace) -> Sequence[Case]:
    """The lines that a command line asks for.

    Raises:
        ConfigError: if a number means no network, or an option has no effect.
    """
    for name, (low, high) in {"stages": (1, None), "depth": (1, MOST), "image_size": (1, None)}.items():
        check_numbers(name, getattr(arguments, name), rule=Rule("int", low=low, high=high))
    check_numbers("width", arguments.width, rule=Rule("number", low=0, open_low=True, high=MOST))
    if not arguments.model:
        for name in ("stages", "segment", "width", "depth", "image_size"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} has no effect without --model. Name a network, such as --model resnet50.")
        return DEFAULT
    grid = itertools.product(
        arguments.model,
        arguments.stages or [4],
        arguments.segment or SEGMENTS,
        arguments.width or [1.0],
        [arguments.image_size or SMALL],
        [arguments.depth or 1],
    )
    return [Case(*point) for point in grid]


def check_numbers(name: str, given: Any, *, rule: Rule) -> None:
    """Hold the numbers of an option, if it was given, against their rule.

    Raises:
        ConfigError: for the first that breaks it.
    """
    for value in given if isinstance(given, list) else [given]:
        if value is not None and not rule.allows(value):
            raise ConfigError(f"--{name} is {value:g}; it must be {rule.describe()}. Change it.")


def row(case: Case, cost: AuxCost) -> tuple[str, ...]:
    """A line of the table as texts."""
    return (
        case.model,
        f"{case.image_size} x {case.image_size}",
        str(case.stages),
        ", ".join(str(cut) for cut in cost.bounds[1:-1]),
        f"{case.segment}, {case.depth}, {case.width:g}",
        f"{cost.network_macs / 1e6:,.0f} M",
        f"{cost.aux_macs / 1e6:,.1f} M",
        f"{100 * cost.macs_share:.1f} %",
        f"{100 * cost.parameters_share:.1f} %",
    )


def table(rows: Iterable[tuple[str, ...]], *, markdown: bool = False) -> Table:
    """The rich table of `row`s."""
    found = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, title=None)
    for name in ("network", "image", "K", "cut at layer", "segment, depth, width", "MACs", "AuxNet's", "share"):
        found.add_column(name, justify="left" if name in ("network", "segment, depth, width") else "right")
    found.add_column("of parameters", justify="right")
    for cells in rows:
        found.add_row(*cells)
    return found


if __name__ == "__main__":
    sys.exit(main())
