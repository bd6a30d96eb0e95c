"""Who should make the batches of a host: every rank for itself, or one rank for all? Samples per second of each way.

    python benchmarks/decode.py                      # two ranks, one thread each
    python benchmarks/decode.py --ranks 4 --threads 2

`every_rank` and `once_per_node` are the values of dsaux.data.decode. The ranks are the stages of one replica on this
machine. They do nothing but read, step by step together, as stages do: so this is the most that the input can give, and
what a rank spends on it is missing for its training. `pictures` are JPEGs of 500 x 375 pixels, cropped to 224 x 224;
`photos` are 32 x 32 pixels in memory. Both ways take turns in blocks in one run.

Lines go to benchmarks/results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pictures import make_pictures
from rich.console import Console
from rich.table import Table
from seeds import append_line

from dsaux.rendezvous import free_port

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("every_rank", "once_per_node")
CASES = ("pictures", "photos")
TIME_LIMIT_S = 600

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        ranks: of one replica on this machine.
        threads: of each rank.
        loader: dali or torch.
        batch_size: images in a batch.
        batches: measured batches in a block.
        blocks: measured blocks of each way.
        warmup: batches discarded at the start of a block; no less than a loader or the shared memory holds ready.
    """

    ranks: int = 2
    threads: int = 1
    loader: str = "dali"
    batch_size: int = 64
    batches: int = 24
    blocks: int = 5
    warmup: int = 8


def main() -> int:
    """Measure, print, append the lines."""
    plan, out = parse_arguments()
    from dsaux.environment import describe_environment

    environment = describe_environment(world_size=plan.ranks)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        root = make_pictures(Path(folder) / "pictures")
        for case in CASES:
            found = measure(plan, case, root=str(root))
            rows += [summary(plan, case, way, found[way], environment=environment) for way in WAYS]
    for row in rows:
        append_line(out, row)
    Console(width=None if sys.stdout.isatty() else 120).print(rich_table(rows))
    return 0


def parse_arguments() -> tuple[Plan, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=Plan.ranks, help="ranks of the host (2)")
    parser.add_argument("--threads", type=int, default=Plan.threads, help="threads of each rank (1)")
    parser.add_argument("--loader", choices=("dali", "torch"), default=Plan.loader, help="dsaux.data.loader (dali)")
    parser.add_argument("--batch_size", type=int, default=Plan.batch_size, help="images in a batch (64)")
    parser.add_argument("--batches", type=int, default=Plan.batches, help="measured batches in a block (24)")
    parser.add_argument("--blocks", type=int, default=Plan.blocks, help="measured blocks of each way (5)")
    parser.add_argument("--warmup", type=int, default=Plan.warmup, help="batches discarded in each block (8)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/decode.jsonl", help="file to append to")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    for name, value in arguments.items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} is {value}; it must be 1 or more.")
    return Plan(**arguments), out


def measure(plan: Plan, case: str, *, root: str) -> dict[str, list[tuple[float, float]]]:
    """Samples per second of the slowest rank, and CPU seconds per 1,000 samples of all ranks, block by block."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    with context.Pool(plan.ranks, maxtasksperchild=1) as pool:
        tasks = [(plan, case, root, rank, port) for rank in range(plan.ranks)]
        found = pool.starmap_async(run_rank, tasks, chunksize=1).get(timeout=TIME_LIMIT_S)
    return found[0]


def run_rank(plan: Plan, case: str, root: str, rank: int, port: int) -> dict[str, list[tuple[float, float]]]:
    """One rank: read both ways in turns."""
    os.environ.update(OMP_NUM_THREADS=str(plan.threads), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from dsaux.config import DataConfig
    from dsaux.data import ReplicaStream, load_dataset
    from dsaux.data.node_share import NodeGroup

    torch.set_num_threads(plan.threads)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=plan.ranks)
    data = DataConfig(name="folder", root=root) if case == "pictures" else DataConfig(name=case)
    dataset = load_dataset(data)

    def exchange(value: str) -> list[str]:
        values: list[Any] = [None] * plan.ranks
        torch.distributed.all_gather_object(values, value)
        return values

    streams = {}
    for way in WAYS:
        group = NodeGroup(tuple(range(plan.ranks)), rank, plan.ranks + 2, TIME_LIMIT_S, exchange)
        streams[way] = ReplicaStream(
            dataset,
            loader=plan.loader,
            seed=0,
            replica=0,
            num_replicas=1,
            micro_batch_size=plan.batch_size,
            micro_batches_per_step=1,
            device="cpu",
            share=group if way == "once_per_node" else None,
        )
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for block in range(-1, plan.blocks):  # block -1 builds pipelines
        for way in WAYS if block % 2 else WAYS[::-1]:
            figures = time_block(streams[way], plan)
            if block >= 0:
                found[way].append(figures)
    torch.distributed.barrier()
    return found


def time_block(stream: Any, plan: Plan) -> tuple[float, float]:
    """Samples per second, all ranks in step, and CPU seconds of all ranks per 1,000 samples."""
    import torch

    for _ in range(plan.warmup):
        next(stream)
    torch.distributed.barrier()
    started, busy = time.perf_counter(), time.process_time()
    for _ in range(plan.batches):
        next(stream)
        torch.distributed.barrier()
    seconds = time.perf_counter() - started
    total = torch.tensor([time.process_time() - busy])
    torch.distributed.all_reduce(total)
    samples = plan.batches * plan.batch_size
    return samples / seconds, 1000 * float(total) / samples


def summary(plan: Plan, case: str, way: str, figures: Sequence[tuple[float, float]], *, environment: Row) -> Row:
    """One line of results."""
    speeds, seconds = zip(*figures, strict=True)
    return {
        **asdict(plan),
        "case": case,
        "decode": way,
        "n": len(figures),
        "samples_per_s": [round(value, 1) for value in (statistics.median(speeds), min(speeds), max(speeds))],
        "cpu_s_per_1000": round(statistics.median(seconds), 3),
        "environment": {key: value for key, value in environment.items() if key not in ("command", "host")},
    }


def rich_table(rows: Sequence[Row]) -> Table:
    """The lines for a terminal."""
    table = Table(title=f"{rows[0]['ranks']} ranks, {rows[0]['threads']} threads each, {rows[0]['loader']}")
    for head in ("images", "dsaux.data.decode"):
        table.add_column(head)
    for head in ("samples/s, median", "lowest to highest", "CPU s per 1,000 samples, all ranks"):
        table.add_column(head, justify="right")
    for row in rows:
        median, low, high = row["samples_per_s"]
        cells = (f"{median:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{row['cpu_s_per_1000']:.2f}")
        table.add_row(row["case"], row["decode"], *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
