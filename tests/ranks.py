"""Starts gloo ranks on this machine for a test and brings back what each returned.

Ranks are forked from a server process that has imported PyTorch and DeepSpeed once, and what torch.optim imports at its
first use, so a test costs a second, not ten. A rank that fails ends the test at once, with its traceback; one that
hangs ends it at the time limit.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

from dsaux.rendezvous import free_port

PRELOADED = ["torch", "torch._dynamo", "deepspeed", "dsaux.engine", "dsaux.bootstrap"]
TIME_LIMIT_S = 180.0


class RankError(AssertionError):
    """A rank of the test raised, died or hung."""


def run_ranks(
    target: Callable[..., Any],
    world_size: int,
    *args: Any,
    time_limit_s: float = TIME_LIMIT_S,
    ends_early: bool = False,
    device: str = "cpu",
) -> list[Any]:
    """Call `target(*args)` in `world_size` processes joined by gloo; return the results in rank order.

    Args:
        target: a function at the top of a test module.
        world_size: number of ranks.
        args: picklable arguments, the same for every rank.
        time_limit_s: seconds until hanging ranks are ended.
        ends_early: a rank's process ends with its own result, so that a rank which waits for it loses its peer, as it
            does in a run; otherwise all live until the last one has its result.
        device: "cpu"; or "cuda", where all ranks share the first GPU and talk through NCCL.

    Raises:
        RankError: with the traceback of the first rank that failed.
    """
    context: Any
    if device == "cpu":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    else:  # a fork of a process that has asked for GPUs can't use them
        context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe()
        environment = rank_environment(rank, world_size, port=port, device=device)
        process = context.Process(target=_rank_main, args=(sender, target, args, environment, ends_early), daemon=True)
        with patch.dict(os.environ, environment):  # what the ranks import looks at it
            process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, world_size, deadline=time.monotonic() + time_limit_s)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], world_size: int, *, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending = dict(zip(pipes, range(world_size), strict=True))
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(pending.values())} did not finish within the time limit")
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                outcome, value = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if outcome == "error":
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(world_size)]


def rank_environment(rank: int, world_size: int, *, port: int, device: str) -> dict[str, str]:
    """What a launcher would set for one rank on this machine.

    Args:
        rank: its rank.
        world_size: processes.
        port: where they meet.
        device: "cpu"; or "cuda", for ranks that share the first GPU. NCCL refuses two ranks of a host on one GPU: each
            says that it is a host of its own, and they talk over the loopback interface.
    """
    alone = device == "cuda"
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": "0" if alone else str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "1" if alone else str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device,
    }
    if alone:
        environment |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # sums that repeat their bits
    return environment


def _rank_main(
    sender: Connection, target: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], ends_early: bool
) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        from dsaux.runtime import start_process_group

        start_process_group(timeout_s=60.0)
        sender.send(("value", target(*args)))
    except BaseException:  # it is reported to the test, whatever it is
        sender.send(("error", traceback.format_exc()))
    with contextlib.suppress(EOFError, OSError):
        if not ends_early:
            sender.recv()  # until all have reported: what this rank's end would break may be under way on another
    sys.stdout.flush()
    os._exit(0)
