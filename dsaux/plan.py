"""Says which way to train a network on so many devices: one process, DDP, an exact pipeline, or dsaux.

python -m dsaux.plan --ds_config ds_configs/quickstart.json --gpus 8
python -m dsaux.plan --ds_config F --gpus 8 --link 1000Mbit/s --memory 80GB --all
python -m dsaux.plan --ds_config F --gpus 64 --save_times times.json     # on a machine with one of the devices
python -m dsaux.plan --ds_config F --gpus 64 --times times.json --json   # anywhere

Layers, AuxNet and optimizer are timed here, on one device; everything else is predicted from that. docs/planner.md says
how, and what it leaves out. Batch, network, AuxNet and optimizer are those of the configuration; its stages and
schedule are not: all are tried.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsaux.command import Parser, progress, run
from dsaux.config import Config, load_config
from dsaux.config_deepspeed import torch_optimizer_of
from dsaux.config_rules import ConfigError, show
from dsaux.plan_show import show_plan

if TYPE_CHECKING:  # take seconds to import: what is wrong with the command line is said before
    from torch import nn

    from dsaux.models.shapes import SampleSpec
    from dsaux.plan_advice import Advice
    from dsaux.plan_links import Link
    from dsaux.plan_workload import Workload
    from dsaux.planner import Prediction

LINK, LATENCY_US = "25GB/s", 10.0
"""Assumed where nothing is said."""
_LARGEST_FORWARD = 2e9
"""Multiply-accumulates of a timed micro-batch on a CPU, as in a dry run; a GPU times all sizes."""
_SMALLEST_TIMED = 2
_MOST_DEVICES = 4096


@dataclass(frozen=True)
class Plan:
    """What came out.

    Attributes:
        config: the configuration.
        devices: how many.
        global_batch: samples in a step.
        link: between devices.
        memory_bytes: of a device; infinite where nothing is said.
        device: what was timed on, in words.
        timed_up_to: largest micro-batch that was timed; 0 for all.
        layer_names: the network's layers.
        predictions: all of them.
        best: each contestant at its fastest, those that fit into memory before those that do not.
        break_even: share of a stage's time below which dsaux-al's AuxNet pays; None where there is nothing to compare.
        advice: what to do.
    """

    config: Config
    devices: int
    global_batch: int
    link: Link
    memory_bytes: float
    device: str
    timed_up_to: int
    layer_names: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    best: tuple[Prediction, ...]
    break_even: float | None
    advice: Advice

    def fits(self, prediction: Prediction) -> bool:
        """Whether a way fits into a device's memory."""
        return prediction.memory_bytes <= self.memory_bytes


def make_plan(config: Config, workload: Workload, *, devices: int, link: Link, memory_bytes: float = math.inf) -> Plan:
    """Predict every way and choose.

    Args:
        config: the checked configuration.
        workload: times and sizes of its network.
        devices: how many.
        link: between devices.
        memory_bytes: of a device.

    Raises:
        ConfigError: if the batch cannot be shared in any way.
    """
    from dsaux.plan_advice import advise
    from dsaux.planner import CONTESTANTS, best, break_even_aux_share, candidates

    batch = global_batch_of(config)
    names = [name for name in CONTESTANTS if name != "dsaux-local" or workload.head_cost is not None]
    predictions = list(candidates(workload, devices=devices, global_batch=batch, link=link, contestants=names))
    if not predictions:
        raise ConfigError(
            f"train_batch_size is {batch}, which cannot be shared by {devices} devices in any way. Set it to a "
            f"multiple of {2 * devices}."
        )
    chosen = []
    for name in names:
        own = [its for its in predictions if its.contestant == name]
        fastest = best(own, memory_bytes=memory_bytes) or best(own)
        chosen += [fastest] if fastest is not None else []
    chosen.sort(key=lambda its: (its.memory_bytes > memory_bytes, -its.samples_per_s))
    try:
        share = break_even_aux_share(workload, devices=devices, global_batch=batch, link=link)
    except ValueError:
        share = None
    return Plan(
        config=config,
        devices=devices,
        global_batch=batch,
        link=link,
        memory_bytes=memory_bytes,
        device=workload.device,
        timed_up_to=workload.timed_up_to,
        layer_names=workload.layer_names,
        predictions=tuple(predictions),
        best=tuple(chosen),
        break_even=share,
        advice=advise([its for its in chosen if its.memory_bytes <= memory_bytes], devices=devices),
    )


def global_batch_of(config: Config) -> int:
    """The batch that all ways share.

    Raises:
        ConfigError: if the configuration leaves it to the number of replicas.
    """
    batch = config.deepspeed.get("train_batch_size")
    if batch is None:
        raise ConfigError(
            "train_batch_size is missing; all ways of training are compared at one global batch. Set it, such as "
            "--set train_batch_size=256."
        )
    return int(batch)


def measure_config(config: Config, *, devices: int, say: Callable[[str], None]) -> Workload:
    """Measure a configuration's network here and now.

    Args:
        config: the checked configuration.
        devices: how many the plan is for; on a CPU as many of this machine's cores are kept busy meanwhile.
        say: is told what is being timed, also by what is measured later.

    Raises:
        ConfigError: if the data set or the network cannot be had.
    """
    import torch

    from dsaux.config import aux_optimizer
    from dsaux.data import dataset_facts
    from dsaux.models.causality import run_layers
    from dsaux.models.cost import chain_cost
    from dsaux.plan_measure import measure_workload
    from dsaux.size_check import check_sizes

    check_sizes(config)
    settings = config.dsaux
    facts = dataset_facts(settings.data)
    layers = run_layers(settings, num_classes=facts.num_classes, input_spec=facts.input_spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timed_up_to = neighbours = 0
    if device.type == "cpu":
        # A device is a rank's share of this machine's cores, as in a run, and the other ranks are at work on theirs.
        cores = os.cpu_count() or 1
        neighbours = min(devices, cores) - 1
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores // (1 + neighbours)))
        cost = chain_cost([layer.make for layer in layers], input_spec=facts.input_spec)
        timed_up_to = max(_SMALLEST_TIMED, int(_LARGEST_FORWARD // max(1, cost.multiply_accumulates)))
    workload = measure_workload(
        layers,
        input_spec=facts.input_spec,
        micro_batch_sizes=(),
        device=device,
        aux_depth=settings.aux.depth,
        aux_width=settings.aux.width,
        aux_segment=settings.aux.segment,
        seed=settings.run.seed,
        optimizer=_stage_optimizer(config),
        aux_optimizer=aux_optimizer(config),
        make_head=_make_head,
        timed_up_to=timed_up_to,
        neighbours=neighbours,
        say=say,
    )
    return replace(workload, network=settings.model.name)


def to_json(plan: Plan) -> dict[str, Any]:
    """The same for programs."""
    chosen = plan.advice.prediction
    return {
        "model": plan.config.dsaux.model.name,
        "data": plan.config.dsaux.data.name,
        "devices": plan.devices,
        "global_batch": plan.global_batch,
        "measured_on": plan.device,
        "timed_up_to": plan.timed_up_to,
        "link_bytes_per_s": plan.link.bytes_per_s,
        "link_latency_s": plan.link.latency_s,
        "memory_bytes": None if math.isinf(plan.memory_bytes) else plan.memory_bytes,
        "break_even_aux_share": plan.break_even,
        "predictions": [{**asdict(its), "fits": plan.fits(its)} for its in plan.predictions],
        "best": {its.contestant: plan.predictions.index(its) for its in plan.best},
        "advice": {"prediction": None if chosen is None else plan.predictions.index(chosen), "text": plan.advice.text},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: if the command line, the configuration or the file of times is wrong.
    """
    arguments = _parse(argv)
    os.environ.setdefault("DS_ACCELERATOR", _accelerator())  # DeepSpeed speaks up where it finds none
    from dsaux.plan_file import from_json
    from dsaux.plan_file import to_json as times_to_json
    from dsaux.plan_links import parse_link, parse_memory

    link = parse_link(arguments.link or LINK, latency_s=1e-6 * arguments.latency_us)
    memory_bytes = math.inf if arguments.memory is None else float(parse_memory(arguments.memory))
    config = load_config(arguments.ds_config, overrides=arguments.set)
    global_batch_of(config)
    with progress() as say:
        if arguments.times is None:
            workload = measure_config(config, devices=arguments.gpus, say=say)
        else:
            workload = from_json(_read(arguments.times), source=f"--times {arguments.times}")
            if workload.network != config.dsaux.model.name:
                raise ConfigError(
                    f"--times {arguments.times} holds times of {show(workload.network)}, but dsaux.model.name is "
                    f"{show(config.dsaux.model.name)}. Give times of that network."
                )
        plan = make_plan(config, workload, devices=arguments.gpus, link=link, memory_bytes=memory_bytes)
    if arguments.save_times is not None:
        _write(arguments.save_times, times_to_json(workload))
    if arguments.json:
        print(json.dumps(to_json(plan)))
    else:
        show_plan(plan, every=arguments.all)
    return 0


# ---- parts ----------------------------------------------------------------------------------------------------------


def _make_head(boundary: SampleSpec, scores: SampleSpec) -> nn.Module:
    from dsaux.models.local_heads import make_local_head

    return make_local_head(boundary, scores=scores)


def _stage_optimizer(config: Config) -> tuple[str, dict[str, Any]]:
    """In torch.optim: its own twin, or for DeepSpeed's own AdamW, with as many moments as `dsaux.memory` counts."""
    try:
        return torch_optimizer_of(config.deepspeed["optimizer"], path="optimizer")
    except ConfigError:
        return "AdamW", {}


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--times {path} cannot be read: {reason}. Give a file that --save_times wrote.") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save_times {path} cannot be written: {error.strerror}. Name another file.") from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m dsaux.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ds_config", required=True, metavar="FILE", help="DeepSpeed JSON with a dsaux block")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="devices, each like the one measured on")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the file, e.g. --set train_batch_size=256; may be repeated",
    )
    parser.add_argument(
        "--link", metavar="SPEED", help=f"speed between devices, like 25GB/s or 1000Mbit/s (assumed: {LINK})"
    )
    parser.add_argument(
        "--latency_us",
        type=float,
        default=LATENCY_US,
        metavar="T",
        help=f"microseconds of a message beside its bytes (assumed: {LATENCY_US:g})",
    )
    parser.add_argument("--memory", metavar="SIZE", help="of a device, like 80GB; what does not fit is ruled out")
    parser.add_argument("--times", type=Path, metavar="FILE", help="times of another machine, in place of measuring")
    parser.add_argument("--save_times", type=Path, metavar="FILE", help="write the times that were used")
    parser.add_argument("--all", action="store_true", help="every shape of every contestant, not the best of each")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.gpus <= _MOST_DEVICES:
        parser.error(f"--gpus is {arguments.gpus}; it must be 1 .. {_MOST_DEVICES}")
    if not 0 <= arguments.latency_us < math.inf:
        parser.error(f"--latency_us is {arguments.latency_us}; it must be 0 or more")
    return arguments


if __name__ == "__main__":
    sys.exit(run(main))
