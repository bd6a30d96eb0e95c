"""A step of what computes exact gradients: one process, DDP, pipelines. Called by `dsaux.planner`."""

from __future__ import annotations

from collections.abc import Sequence

from dsaux.plan_links import all_reduce_bytes
from dsaux.plan_orders import (
    BACKWARD,
    FORWARD,
    ORDERS,
    TAKEN_APART,
    WEIGHT_GRAD,
    ChunkCost,
    Pass,
    order_of,
    rank_of_chunk,
)
from dsaux.plan_replay import replay_times
from dsaux.plan_step import Piece, Setting, Step
from dsaux.plan_workload import BackwardSplit

BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * 2**20, 2**20
"""DistributedDataParallel's defaults: gradients are summed in buckets of this size, the first one smaller."""


def data_parallel(setting: Setting) -> Step:
    """DDP, or one process where there is one replica.

    The micro-batches but the last run without a sum (`no_sync`). In the last backward pass a bucket's sum starts when
    its gradients are there and the bucket before it is through; the optimizer waits for the last one::

        compute   F B  F B  F | B of last layers | B | B of first layers |         update
        link                                     [bucket 0][bucket 1]....[bucket 2]
    """
    workload, link, ranks = setting.workload, setting.link, setting.replicas
    whole = setting.piece(0)
    micro_batch_s = whole.times.total_s + workload.overhead_s
    now = setting.micro_batches * micro_batch_s - whole.times.backward_s
    times = workload.layer_times(setting.micro_batch_size)
    link_free, bucket, room = 0.0, 0, FIRST_BUCKET_BYTES
    for index in reversed(range(workload.num_layers)):
        now += times[index].backward_s
        bucket += workload.parameter_bytes[index]
        if bucket >= room or index == 0:
            link_free = max(now, link_free) + link.all_reduce_s(bucket, ranks=ranks)
            bucket, room = 0, BUCKET_BYTES
    busy = setting.micro_batches * micro_batch_s + whole.update_s
    # DDP's buckets are a second copy of the gradients unless they are views; DDP's default is no views
    copies = 1.0 if ranks > 1 else 0.0
    return Step(
        seconds=max(now, link_free) + whole.update_s,
        busy_s=(busy,),
        sent_bytes=all_reduce_bytes(whole.parameter_bytes, ranks=ranks),
        memory_bytes=(whole.parameter_bytes * (setting.held_per_parameter + copies) + whole.kept_bytes,),
        longest_stage_s=setting.micro_batches * whole.times.total_s,
    )


def exact_pipeline(setting: Setting) -> Step:
    """A pipeline of DeepSpeed or PyTorch: its order of passes and messages, replayed with measured times.

    Behind its last pass a rank sums its gradients over the replicas, then updates.
    """
    per_rank = ORDERS[setting.contestant]
    pieces = [setting.piece(index) for index in range(setting.stages * per_rank)]
    split = BackwardSplit()
    if setting.contestant in TAKEN_APART:
        split = setting.workload.split(setting.micro_batch_size)
    chunks = [
        ChunkCost(
            # the engine's own time comes once per micro-batch and rank
            forward_s=piece.times.forward_s + setting.workload.overhead_s / per_rank,
            backward_s=piece.times.backward_s,
            transfer_s=setting.link.seconds(piece.output_bytes),
            split=split,
        )
        for piece in pieces
    ]
    order = order_of(setting.contestant, chunks=chunks, stages=setting.stages, micro_batches=setting.micro_batches)
    cores = None if setting.cores is None else [rank % setting.cores for rank in range(setting.stages)]
    replayed = replay_times(order.operations, cores=cores)
    held: list[list[Piece]] = [[] for _ in range(setting.stages)]
    crossing = 0
    for index, piece in enumerate(pieces):
        rank = rank_of_chunk(setting.contestant, index, stages=setting.stages)
        held[rank].append(piece)
        last = index == len(pieces) - 1
        if not last and rank_of_chunk(setting.contestant, index + 1, stages=setting.stages) != rank:
            crossing += 2 * setting.micro_batches * piece.output_bytes  # an activation there, a gradient back
    parameters = [sum(piece.parameter_bytes for piece in own) for own in held]
    updates = [sum(piece.update_s for piece in own) for own in held]
    ends = [
        end + setting.link.all_reduce_s(size, ranks=setting.replicas) + update
        for end, size, update in zip(replayed.end_s, parameters, updates, strict=True)
    ]
    memory = [
        size * setting.held_per_parameter + _peak_kept(passes, pieces)
        for size, passes in zip(parameters, order.passes, strict=True)
    ]
    return Step(
        seconds=max(ends),
        busy_s=tuple(busy + update for busy, update in zip(replayed.busy_s, updates, strict=True)),
        sent_bytes=setting.replicas * crossing + all_reduce_bytes(sum(parameters), ranks=setting.replicas),
        memory_bytes=tuple(memory),
        longest_stage_s=setting.micro_batches * max(sum(piece.times.total_s for piece in own) for own in held),
    )


def _peak_kept(passes: Sequence[Pass], pieces: Sequence[Piece]) -> float:
    """Most bytes kept at a time on a rank: from a forward pass to the last part of its backward pass."""
    now = peak = 0.0
    for step in passes:
        if step.kind == FORWARD:
            now += pieces[step.chunk].kept_bytes
        elif step.kind in (BACKWARD, WEIGHT_GRAD):
            now -= pieces[step.chunk].kept_bytes
        peak = max(peak, now)
    return peak
