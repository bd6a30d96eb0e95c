"""What one GPU does with a stage's step: eager, compiled, and replayed as a CUDA graph, in float32 and bf16.

    python benchmarks/device.py                     the most important cases first, until the budget of time is spent
    python benchmarks/device.py --quick --device cpu    a tiny network on a CPU: shows that everything runs, no more

Needs PyTorch alone; networks of torchvision are left out where it is missing. Stages run one after the other on the one
device: nothing is sent, so a line is what a rank computes in a tick, without DeepSpeed's own Python. Lines are appended
to benchmarks/results/device.jsonl as they come, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import engine_step
import torch
from device_clock import free, matmul_peak, time_blocks
from device_plan import RESNET110, TINY, Measurement, Network, plan
from seeds import Row, append_line, read_lines
from stage_step import (
    AsideStep,
    Bare,
    Compiled,
    CompiledGraphed,
    Eager,
    Graphed,
    StageStep,
    deterministic_kernels,
    losses,
)
from torch.utils.flop_counter import FlopCounterMode

from dsaux.environment import describe_environment
from dsaux.graph_capture import CudaCapture
from dsaux.runtime import peak_memory_bytes
from dsaux.watch_rules import headline

ROOT = Path(__file__).resolve().parent.parent
EQUALITY_STEPS = 200
COMPILED_ON_CPU = "compiled code of a CPU says nothing about a GPU"
NO_GRAPHS = "a CPU has no graphs"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure until the budget is spent; 1 if something failed."""
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but PyTorch finds no GPU here. Give --quick --device cpu to try.", file=sys.stderr)
        return 2
    ends = time.monotonic() + arguments.budget_s
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    environment = describe_environment(world_size=1)
    common = {
        "suite": "device",
        "machine_was_busy": arguments.busy,
        "environment": {key: value for key, value in environment.items() if key not in ("command", "host")},
    }
    peaks = {precision: matmul_peak(precision, device, quick=arguments.quick) for precision in ("fp32", "bf16")}
    failed = 0
    network, steps = (TINY, 10) if arguments.quick else (RESNET110, EQUALITY_STEPS)
    whole = replace(network, stages=1)
    left = [one for one in plan(quick=arguments.quick) if not (arguments.add and _is_measured(one, arguments.out))]
    precisions = ("fp32", "bf16")
    known = {row["case"] for row in read_lines(arguments.out) if row["failed"] is None} if arguments.add else set()
    first: Iterator[Row] = itertools.chain(
        (
            equality_row(network, index, precision, steps=steps, device=device)
            for precision, index in itertools.product(precisions, range(network.stages))
            if equality_case(network, index, precision) not in known
        ),
        (
            engine_row(whole, precision, device=device, quick=arguments.quick)
            for precision in precisions
            if engine_case(whole, precision) not in known
        ),
    )
    rows: Iterator[Row] = itertools.chain(
        first,
        (measured_row(one, device=device, peak=peaks[one.precision], quick=arguments.quick) for one in _taken(left)),
    )
    while time.monotonic() < ends and (row := next(rows, None)) is not None:
        append_line(arguments.out, {**row, **common})
        failed += row["failed"] is not None
        print(said(row), flush=True)
    if left:
        print(f"the budget of {arguments.budget_s:g} s is spent: {len(left)} measurements were left out", flush=True)
    return 1 if failed else 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to measure (cuda)")
    parser.add_argument("--budget_s", type=float, default=480.0, help="seconds after which nothing new begins (480)")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few steps")
    parser.add_argument("--add", action="store_true", help="leave out the steps of which the file has a line")
    parser.add_argument("--busy", action="store_true", help="other work runs beside: say so in the lines")
    default = ROOT / "benchmarks/results/device.jsonl"
    parser.add_argument("--out", type=Path, default=default, help="file to append to (benchmarks/results/device.jsonl)")
    return parser.parse_args(argv)


def _taken(left: list[Measurement]) -> Iterator[Measurement]:
    while left:
        yield left.pop(0)


def _is_measured(one: Measurement, out: Path) -> bool:
    key = {"case": one.case, "precision": one.precision, "mode": one.mode, "channels_last": one.channels_last}
    steps = (row for row in read_lines(out) if row["kind"] == "step")
    return any(row["failed"] is None and key.items() <= row.items() for row in steps)


# ---- lines ----------------------------------------------------------------------------------------------------------


def measured_row(measurement: Measurement, *, device: torch.device, peak: float, quick: bool) -> Row:
    """One line: the times of a stage's step.

    Args:
        measurement: what to measure.
        device: where.
        peak: FLOP/s of large matrix products in this precision.
        quick: few steps.
    """
    network = measurement.network
    row: Row = {
        "kind": "step",
        "case": measurement.case,
        "model": network.model,
        "stages": network.stages,
        "stage": measurement.index,
        "batch": network.batch,
        "image_size": network.image_size,
        "segment": network.segment,
        "width": network.width,
        "precision": measurement.precision,
        "mode": measurement.mode,
        "channels_last": measurement.channels_last,
        "tf32": bool(torch.backends.cudnn.allow_tf32) and device.type == "cuda",
        "skipped": why_skipped(measurement.mode, device),
        "failed": None,
    }
    if row["skipped"] is not None:
        return row
    try:
        row.update(_figures(measurement, device=device, peak=peak, quick=quick))
    except ImportError as error:
        row["skipped"] = f"{error.name} is missing"
    except Exception as error:  # out of memory, a compiler that is missing: the others are measured all the same
        row["failed"] = headline(error)
    finally:
        free(device)
    return row


def _figures(measurement: Measurement, *, device: torch.device, peak: float, quick: bool) -> Row:
    free(device)
    step = (AsideStep if "aside" in measurement.mode else StageStep)(measurement.stage(), device)
    with FlopCounterMode(display=False) as counter:
        step.passes()
    step.clear()
    flops = counter.get_total_flops()
    runner = _runner(measurement.mode, step, device)
    times = time_blocks(runner.run, device, quick=quick)
    step_s = statistics.median(times)
    has_aux = step.aux_net is not None
    aux_s = statistics.median(time_blocks(runner.run_aux, device, quick=quick)) if has_aux else 0.0
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {
        "bounds": list(measurement.network.bounds),
        "n": len(times),
        "step_s": [step_s, min(times), max(times)],
        "samples_per_s": measurement.network.batch / step_s,
        "aux_s": aux_s,
        "aux_share": aux_s / step_s,
        "flops": flops,
        "flops_per_s": flops / step_s,
        "matmul_flops_per_s": peak,
        "share_of_peak": flops / step_s / peak,
        "loss": float(step.loss),
        "peak_memory_bytes": peak_memory_bytes(device),
        "reserved_memory_bytes": reserved,
    }


def equality_case(network: Network, index: int, precision: str) -> str:
    """Name of an equality line."""
    return f"{network.model}, batch {network.batch}, K={network.stages}, stage {index}, {precision}, equality"


def engine_case(network: Network, precision: str) -> str:
    """Name of an engine line."""
    return f"{network.model}, batch {network.batch}, K=1, {precision}"


def equality_row(network: Network, index: int, precision: str, *, steps: int, device: torch.device) -> Row:
    """One line: whether a graphed stage has the losses of an eager one, with kernels that repeat their bits."""
    row: Row = {
        "kind": "equality",
        "case": equality_case(network, index, precision),
        "steps": steps,
        "skipped": why_skipped("graphed", device),
        "failed": None,
    }
    if row["skipped"] is not None:
        return row
    try:
        found: dict[str, list[float]] = {}
        for name, mode in (("eager", "eager"), ("eager again", "eager"), ("graphed", "graphed")):
            with deterministic_kernels():
                step = StageStep(Measurement(network, index, precision, mode).stage(), device)
                found[name] = losses(_runner(mode, step, device), steps)
        row["first_loss"], row["last_loss"] = found["eager"][0], found["eager"][-1]
        row["eager_largest_difference"] = _largest(found["eager"], found["eager again"])
        row["graphed_largest_difference"] = _largest(found["eager"], found["graphed"])
    except Exception as error:  # as above
        row["failed"] = headline(error)
    finally:
        free(device)
    return row


def engine_row(network: Network, precision: str, *, device: torch.device, quick: bool) -> Row:
    """One line: the engine with and without graphs, one stage; skipped where DeepSpeed is missing."""
    steps = 6 if quick else 50
    row: Row = {
        "kind": "engine",
        "case": engine_case(network, precision),
        "steps": steps,
        "skipped": None,
        "failed": None,
    }
    try:
        timed = functools.partial(time_blocks, device=device, quick=quick)
        row.update(engine_step.compare(network, precision=precision, steps=steps, device=device, time_blocks=timed))
    except ImportError as error:
        row["skipped"] = f"{error.name} is missing"
    except Exception as error:  # as above
        row["failed"] = headline(error)
    finally:
        free(device)
    return row


def said(row: Row) -> str:
    """A line for a person."""
    name = (
        f"{row['case']}, {row['precision']}, {row['mode']}"
        if row["kind"] == "step"
        else row["case"] + (", the engine" if row["kind"] == "engine" else "")
    )
    if row["failed"] is not None:
        return f"{name}: failed, {row['failed']}"
    if row["skipped"] is not None:
        return f"{name}: skipped, {row['skipped']}"
    if row["kind"] == "engine":
        eager, graphed = (1e3 * statistics.median(row[key]) for key in ("eager_s", "graphed_s"))
        told = "; ".join(row["told"]) or f"{row['captured_forms']} form captured"
        return (
            f"{name}: {eager:.3f} ms eager, {graphed:.3f} ms with graphs, largest difference of {row['steps']} losses "
            f"{row['graphed_largest_difference']:.3g}; {told}"
        )
    if row["kind"] == "equality":
        return (
            f"{name}: largest difference of {row['steps']} losses {row['graphed_largest_difference']:.3g}, "
            f"of two eager runs {row['eager_largest_difference']:.3g}"
        )
    median, low, high = (1e3 * value for value in row["step_s"])
    return (
        f"{name}: {median:.3f} ms ({low:.3f} to {high:.3f}), AuxNet {100 * row['aux_share']:.0f} %, "
        f"{row['flops_per_s'] / 1e12:.2f} TFLOP/s ({100 * row['share_of_peak']:.0f} % of a matrix product), "
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


# ---- parts ----------------------------------------------------------------------------------------------------------


def why_skipped(mode: str, device: torch.device) -> str | None:
    """Why a mode is not measured on a device; None if it is."""
    if device.type == "cuda":
        return None
    reasons = {
        "graphed": NO_GRAPHS,
        "graphed aside": NO_GRAPHS,
        "compiled graphed": NO_GRAPHS,
        "compiled": COMPILED_ON_CPU,
        "bare": COMPILED_ON_CPU,
    }
    return reasons.get(mode)


def _runner(mode: str, step: StageStep, device: torch.device) -> Eager:
    if mode in ("graphed", "graphed aside", "compiled graphed"):
        return {"compiled graphed": CompiledGraphed}.get(mode, Graphed)(step, CudaCapture(device))
    return {"eager": Eager, "compiled": Compiled, "bare": Bare}[mode](step)


def _largest(one: Sequence[float], two: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


if __name__ == "__main__":
    sys.exit(main())
