"""Times on one device, a large matrix product among them; for `benchmarks/device.py`."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP_RUNS, BLOCKS, BLOCK_S = 8, 5, 0.3


def time_blocks(run: Callable[[int], Any], device: torch.device, *, quick: bool) -> list[float]:
    """Seconds of a run, one value for each block; the device is waited for around a block only.

    Args:
        run: called with the number of the run.
        device: where it runs.
        quick: short blocks.
    """
    for index in range(WARMUP_RUNS):
        run(index)
    wait(device)
    started = time.perf_counter()
    run(WARMUP_RUNS)
    wait(device)
    per_block = 1 if quick else max(3, int(BLOCK_S / (time.perf_counter() - started)))
    times, index = [], WARMUP_RUNS + 1
    for _ in range(2 if quick else BLOCKS):
        started = time.perf_counter()
        for _ in range(per_block):
            run(index)
            index += 1
        wait(device)
        times.append((time.perf_counter() - started) / per_block)
    return times


def matmul_peak(precision: str, device: torch.device, *, quick: bool) -> float:
    """FLOP/s of products of large square matrices; float32 ones as convolutions do them, that is with TF32."""
    side = 256 if quick else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, two = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        times = time_blocks(lambda _: torch.matmul(one, two), device, quick=quick)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return float(2 * side**3 / statistics.median(times))


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what the measurement before has left."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
