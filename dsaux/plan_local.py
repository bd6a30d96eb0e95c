"""A step of the decoupled contestants: dsaux's penalty and augmented Lagrangian, greedy local losses.

Called by `dsaux.planner`. On every rank a tick is M times (AuxNet forward, forward, backward, AuxNet backward), then
the sum of the AuxNet's gradients over all ranks, started before and awaited after the stage's own sum over its
replicas and its update::

    stage 0   aF F | B aB | ... | aF F | B aB |own sum|update|......wait|aux update
    stage 1   aF F | B aB | ... | aF F | B aB |..............own sum|..|aux update
                                              [sum of the AuxNet's gradients, when the last rank has come]

Under `al` a message leaves stage k behind its last backward pass and is needed by stage k-1 in the next tick, behind
its first forward pass; with local losses one leaves stage k behind its last forward pass and is needed by stage k+1
before its first. Ticks are replayed one after the other until they repeat; fill and drain are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsaux.partition import LayerTimes
from dsaux.plan_links import all_reduce_bytes
from dsaux.plan_step import Piece, Setting, Step
from dsaux.plan_workload import SegmentCost

_MESSAGES = 2  # of the AuxNet's gradients: one is filled while the other is under way (`dsaux.memory`)
_NUMBER = 4  # bytes


@dataclass(frozen=True)
class _Rank:
    """One stage: its layers, the AuxNet's segments (or the head) that it evaluates, a micro-batch each."""

    piece: Piece
    aux: LayerTimes
    aux_kept_bytes: float
    overhead_s: float

    @property
    def micro_batch_s(self) -> float:
        return self.overhead_s + self.aux.total_s + self.piece.times.total_s


@dataclass(frozen=True)
class _Mail:
    """The message of a tick: who gets it, and when it leaves and is needed within a tick."""

    to: int
    """Rank of the receiver, less that of the sender."""
    size_bytes: tuple[int, ...]
    """Of the message to each rank; 0 for none."""
    leaves_before_end_s: tuple[float, ...]
    """Of each rank, seconds before the end of its computing."""
    needed_after_s: tuple[float, ...]
    """Of each rank, seconds behind the beginning of its tick."""


def penalty_step(setting: Setting) -> Step:
    """Lock-step ticks: nothing but the AuxNet's sum crosses a boundary."""
    parts = _aux_parts(setting)
    return _step(setting, _aux_ranks(setting, parts), parts=parts, mail=None)


def al_step(setting: Setting) -> Step:
    """A wavefront, last stage first; refreshed variables go from stage k to stage k-1."""
    parts = _aux_parts(setting)
    ranks = _aux_ranks(setting, parts)
    sizes = [setting.micro_batches * rank.piece.output_bytes for rank in ranks[:-1]]
    mail = _Mail(
        to=-1,
        size_bytes=(*sizes, 0),
        leaves_before_end_s=tuple(rank.aux.backward_s for rank in ranks),
        needed_after_s=tuple(rank.overhead_s + rank.aux.forward_s + rank.piece.times.forward_s for rank in ranks),
    )
    return _step(setting, ranks, parts=parts, mail=mail)


def local_step(setting: Setting) -> Step:
    """A wavefront, first stage first; activations go from stage k to stage k+1, a head gives each its loss."""
    size, bounds = setting.micro_batch_size, setting.cut.bounds
    parts = [setting.workload.head(cut, size) for cut in bounds[1:-1]]
    if not all(part.is_possible for part in parts):
        raise ValueError(f"there is no head for one of the boundaries at {list(bounds[1:-1])}.")
    ranks = []
    for stage in range(setting.stages):
        own = parts[stage : stage + 1]  # the last stage has the network's own head
        rank = _rank(setting, stage, own)
        # a head is summed over the replicas and updated with its stage
        parameter_bytes = rank.piece.parameter_bytes + sum(part.parameter_bytes for part in own)
        update_s = rank.piece.update_s + sum(part.update_s for part in own)
        piece = replace(rank.piece, parameter_bytes=parameter_bytes, update_s=update_s)
        ranks.append(replace(rank, piece=piece))
    sizes = [setting.micro_batches * rank.piece.output_bytes for rank in ranks[:-1]]
    mail = _Mail(
        to=1,
        size_bytes=(0, *sizes),
        leaves_before_end_s=tuple(rank.aux.total_s + rank.piece.times.backward_s for rank in ranks),
        needed_after_s=(0.0,) * setting.stages,
    )
    return _step(setting, ranks, parts=[], mail=mail)


def _aux_parts(setting: Setting) -> list[SegmentCost]:
    """The AuxNet's segments T_1 .. T_(K-1)."""
    cuts = setting.cut.bounds[1:-1]
    parts = [
        setting.workload.segment(source, target, setting.micro_batch_size)
        for source, target in zip([None, *cuts], cuts, strict=False)
    ]
    if not all(part.is_possible for part in parts):
        raise ValueError(f"the AuxNet cannot make the boundaries of the cuts {list(cuts)}.")
    return parts


def _aux_ranks(setting: Setting, parts: Sequence[SegmentCost]) -> list[_Rank]:
    """Stage k evaluates T_1 .. T_(k+1): its input and its target."""
    return [_rank(setting, stage, parts[: stage + 1]) for stage in range(setting.stages)]


def _rank(setting: Setting, stage: int, parts: Sequence[SegmentCost]) -> _Rank:
    return _Rank(
        piece=setting.piece(stage),
        aux=LayerTimes(sum(part.forward_s for part in parts), sum(part.backward_s for part in parts)),
        aux_kept_bytes=setting.micro_batch_size * sum(part.kept_bytes for part in parts),
        overhead_s=setting.workload.overhead_s,
    )


def _step(setting: Setting, ranks: Sequence[_Rank], *, parts: Sequence[SegmentCost], mail: _Mail | None) -> Step:
    link, replicas, count = setting.link, setting.replicas, setting.micro_batches
    everyone = setting.stages * replicas
    parameters = sum(part.parameter_bytes for part in parts)
    # beside the gradients: three figures of each boundary, the loss, a digest of each rank's batch
    summed = parameters + _NUMBER * (3 * len(parts) + 1 + everyone) if setting.stages > 1 else 0
    aux_update_s = sum(part.update_s for part in parts)
    own_sums = [link.all_reduce_s(rank.piece.parameter_bytes, ranks=replicas) for rank in ranks]
    seconds = _tick_s(
        setting,
        ranks,
        after_s=[own + rank.piece.update_s for own, rank in zip(own_sums, ranks, strict=True)],
        sum_s=link.all_reduce_s(summed, ranks=everyone),
        aux_update_s=aux_update_s,
        mail=mail,
    )
    sent = sum(all_reduce_bytes(rank.piece.parameter_bytes, ranks=replicas) for rank in ranks)
    sent += all_reduce_bytes(summed, ranks=everyone) + (replicas * sum(mail.size_bytes) if mail else 0)
    layers_s = [count * rank.piece.times.total_s for rank in ranks]
    return Step(
        seconds=seconds,
        busy_s=tuple(count * rank.micro_batch_s + rank.piece.update_s + aux_update_s for rank in ranks),
        sent_bytes=sent,
        memory_bytes=tuple(
            rank.piece.parameter_bytes * setting.held_per_parameter
            + rank.piece.kept_bytes
            + parameters * (setting.aux_held_per_parameter + _MESSAGES)
            + rank.aux_kept_bytes
            + _mail_bytes(mail, stage)
            for stage, rank in enumerate(ranks)
        ),
        longest_stage_s=max(layers_s),
        aux_share=max(
            count * rank.aux.total_s / seconds_ if seconds_ > 0 else 0.0
            for rank, seconds_ in zip(ranks, layers_s, strict=True)
        ),
    )


def _mail_bytes(mail: _Mail | None, stage: int) -> int:
    """Buffers of a rank: what it gets and what it sends."""
    if mail is None:
        return 0
    receiver = stage + mail.to
    return mail.size_bytes[stage] + (mail.size_bytes[receiver] if 0 <= receiver < len(mail.size_bytes) else 0)


def _tick_s(
    setting: Setting,
    ranks: Sequence[_Rank],
    *,
    after_s: Sequence[float],
    sum_s: float,
    aux_update_s: float,
    mail: _Mail | None,
) -> float:
    """Length of a tick once ticks repeat."""
    num_ranks = len(ranks)
    starts, arrivals = [0.0] * num_ranks, [0.0] * num_ranks
    compute_s = [setting.micro_batches * rank.micro_batch_s for rank in ranks]
    ends = []
    warm_up, counted = 4 * num_ranks, 2 * num_ranks
    for _ in range(warm_up + counted + 1):
        done = []
        for rank, (start, length) in enumerate(zip(starts, compute_s, strict=True)):
            before = mail.needed_after_s[rank] if mail is not None else 0.0
            done.append(max(start + before, arrivals[rank]) + length - before)
        if mail is not None:
            for rank, size in enumerate(mail.size_bytes):
                sender = rank - mail.to
                if size:
                    left = max(done[sender] - mail.leaves_before_end_s[sender], arrivals[rank])
                    arrivals[rank] = left + setting.link.seconds(size)
        # a sum ends for nobody before the last has joined; with one stage there is none
        summed = max(done) + sum_s if setting.stages > 1 else 0.0
        starts = [max(end + after, summed) + aux_update_s for end, after in zip(done, after_s, strict=True)]
        ends.append(max(starts))
    return (ends[-1] - ends[-1 - counted]) / counted
