"""Cuts and predictions for a case, by the planner (`dsaux.planner`), from one measurement of the work's layers."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from cases import Entry
from contestants import CONTESTANTS
from gauges import Pace, at_pace, engine_overhead_s, hollow_work, pace_of
from work import OPTIMIZER, Work

from dsaux.models.local_heads import make_local_head
from dsaux.plan_measure import measure_workload
from dsaux.planner import LayerTimes, Link, Prediction, Workload, predict

CABLE_LATENCY_S = 2e-4
"""Of a message between two network namespaces; a guess that decides nothing beside the rates of the suite."""
_PROBE_BYTES, _PROBES = 2**24, 5


@dataclass(frozen=True)
class Outlook:
    """What an entry gets and should reach.

    Attributes:
        bounds: layer indices that cut the network for it.
        prediction: the planner's, with these bounds.
    """

    bounds: tuple[int, ...]
    prediction: Prediction

    def as_row(self) -> dict[str, Any]:
        """For a line of results; memory is that of tensors alone, idle that of the steady state."""
        keys = ("step_s", "samples_per_s", "idle_share", "bytes_per_step", "memory_bytes", "aux_share")
        return {key: value for key, value in asdict(self.prediction).items() if key in keys}


class Forecast:
    """What the planner says of a work; layers are timed when a size of micro-batch is first asked for.

    Args:
        work: layers that sleep are known without timing, real ones are timed here, in this process.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._workloads: dict[tuple[int, int], Workload] = {}
        self._loopback: Link | None = None
        self._paces: dict[Pace, float] = {}
        self._overheads_s: dict[tuple[Entry, int], float] = {}
        self._hollow: dict[int | None, Workload] = {}

    def learn_pace(self, pace: Pace, step_s: float) -> None:
        """Take in what a lock-step gauge measured.

        Args:
            pace: which one.
            step_s: seconds from barrier to barrier.
        """
        size = self.work.global_batch // pace.micro_batches
        with _threads(pace.threads):
            times = self._workload(pace.threads, ranks=pace.ranks).layer_times(size)
        self._paces[pace] = step_s / (pace.passes * sum(time.total_s for time in times))

    def learn_engine(
        self, entry: Entry, micro_batches: int, *, bounds: tuple[int, ...], step_s: float, cpu_s: float
    ) -> None:
        """Take in what an engine needed for a step with hollow layers.

        Ranks that sleep leave the cores to each other, so that processor time counts; ranks that compute do not.

        Args:
            entry: whose.
            micro_batches: micro-batches in a step.
            bounds: where the layers were cut.
            step_s: seconds of the step.
            cpu_s: processor time in it of the rank with most.
        """
        if self.work.sleeper is not None:
            self._overheads_s[entry, micro_batches] = cpu_s / micro_batches
            return
        self._overheads_s[entry, micro_batches] = engine_overhead_s(
            self._hollow_workload(entry),
            entry.contestant,
            stages=entry.ranks,
            micro_batches=micro_batches,
            global_batch=self.work.global_batch,
            link=self._link(None),
            bounds=bounds,
            step_s=step_s,
            cores=self._shared_cores(entry),
        )

    def spin_times(self, entry: Entry) -> tuple[LayerTimes, ...] | None:
        """What hollow layers are to use up for an entry whose ranks share cores, for a sample; None for the others."""
        cores = self._shared_cores(entry)
        if cores is None:
            return None
        size = self.work.global_batch // entry.ranks
        times = self._workload(entry.threads, ranks=entry.ranks).layer_times(size)
        samples = size * entry.ranks / cores  # the times are those beside all ranks, with a part of a core
        return tuple(LayerTimes(its.forward_s / samples, its.backward_s / samples) for its in times)

    def outlook(
        self,
        entry: Entry,
        micro_batches: int,
        *,
        link_mbit: float | None = None,
        bounds: tuple[int, ...] | None = None,
        gauged: bool = False,
    ) -> Outlook:
        """What an entry should reach at a number of micro-batches.

        Args:
            entry: who.
            micro_batches: micro-batches in a step.
            link_mbit: rate of the link between ranks; None: that of this machine's loopback.
            bounds: where to cut; None takes the best for this entry.
            gauged: use what the gauges have shown, as far as it is known.
        """
        workload = self._workload(entry.threads, ranks=entry.ranks)
        if gauged:
            pace = self._paces.get(pace_of(entry, micro_batches), 1.0)
            workload = at_pace(workload, pace, overhead_s=self._overheads_s.get((entry, micro_batches), 0.0))
        pieces = CONTESTANTS[entry.contestant].chunks
        # One stage under dsaux's engine has no AuxNet: it is a plain loop.
        name = "one-process" if entry.ranks == 1 else entry.contestant
        with _threads(entry.threads):
            prediction = predict(
                workload,
                name,
                stages=entry.ranks if pieces and entry.ranks > 1 else 1,
                replicas=1 if pieces else entry.ranks,
                micro_batches=micro_batches,
                global_batch=self.work.global_batch,
                link=self._link(link_mbit),
                bounds=bounds,
                cores=self._shared_cores(entry),
            )
        return Outlook(prediction.bounds, prediction)

    def _shared_cores(self, entry: Entry) -> int | None:
        """This process's cores where an entry has more ranks that compute than those (`crew` pins them so)."""
        cores = len(os.sched_getaffinity(0))
        return cores if self.work.sleeper is None and entry.ranks > cores else None

    def _workload(self, threads: int, *, ranks: int) -> Workload:
        if (threads, ranks) not in self._workloads:
            with _threads(threads):
                sleeps = self.work.sleeper is not None
                # The other ranks are at work meanwhile; where there are more than cores, they take turns.
                made = sleeping_workload(self.work) if sleeps else timed_workload(self.work, neighbours=ranks - 1)
            self._workloads[threads, ranks] = made
        return self._workloads[threads, ranks]

    def _hollow_workload(self, entry: Entry) -> Workload:
        """Times of an entry's hollow layers."""
        cores = self._shared_cores(entry)
        known = entry.ranks if cores is not None else None
        if known not in self._hollow:
            with _threads(1):
                alone = timed_workload(hollow_work(lambda: self.work, spin=self.spin_times(entry)), neighbours=0)
            self._hollow[known] = alone if cores is None else at_pace(alone, entry.ranks / cores)
        return self._hollow[known]

    def _link(self, mbit: float | None) -> Link:
        if mbit is not None:
            return Link(mbit * 1e6 / 8, CABLE_LATENCY_S)
        if self._loopback is None:
            self._loopback = measure_loopback()
        return self._loopback


def timed_workload(work: Work, *, neighbours: int) -> Workload:
    """Time a network here and now, beside so many processes that compute as well."""
    return measure_workload(
        list(work.layers),
        input_spec=work.input_spec,
        micro_batch_sizes=[],
        device=torch.device("cpu"),
        aux_width=work.aux_width,
        seed=work.seed,
        optimizer=("SGD", OPTIMIZER),
        make_head=lambda boundary, scores: make_local_head(boundary, scores=scores),
        neighbours=neighbours,
    )


def sleeping_workload(work: Work) -> Workload:
    """Layers whose times are set; the AuxNet and all else take no time: what theory says."""
    assert work.sleeper is not None
    means, count = work.sleeper.means_s, len(work.layers)
    parameters = [sum(p.numel() for p in layer.make().parameters()) for layer in work.layers]

    def times(size: int) -> tuple[LayerTimes, ...]:
        return (LayerTimes(size * means["forward"], size * means["backward"]),) * count

    with torch.no_grad():
        sample = torch.zeros(1, *work.input_spec.shape)
        numbers = []
        for layer in work.layers:
            sample = layer.make().body(sample)
            numbers.append(sample.numel())
    return Workload(
        layer_names=tuple(layer.name for layer in work.layers),
        times={},
        update_s=(0.0,) * count,
        parameter_bytes=tuple(4 * number for number in parameters),
        activation_bytes=tuple(4 * number for number in numbers),
        kept_bytes=tuple(4 * number for number in numbers),
        kinds=(0,) * count,
        measure_size=functools.cache(times),
    )


def measure_loopback() -> Link:
    """Speed and latency of this machine's loopback, over one TCP connection; medians."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with ours, theirs:
        whole, empty = [], []
        for seconds, size in ((whole, _PROBE_BYTES), (empty, 1)):
            for _ in range(_PROBES):
                reader = threading.Thread(target=_echo_when_read, args=(theirs, size))
                reader.start()
                started = time.perf_counter()
                ours.sendall(bytes(size))
                ours.recv(1)
                seconds.append(time.perf_counter() - started)
                reader.join()
    latency_s = statistics.median(empty) / 2
    return Link(_PROBE_BYTES / max(1e-9, statistics.median(whole) - latency_s), latency_s)


def _echo_when_read(connection: socket.socket, size: int) -> None:
    while size > 0:
        size -= len(connection.recv(min(size, 2**20)))
    connection.sendall(b"0")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
