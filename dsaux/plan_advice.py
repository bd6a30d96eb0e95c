"""What the planner advises, in words: which way to train, and why. Used by `dsaux.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsaux.display_text import count, throughput
from dsaux.planner import Prediction

AS_FAST = 0.95
"""Part of the best throughput from which on a simpler way is advised instead."""
WORTH = 1.1
"""Times faster that a decoupled method has to be than every exact one: it does not compute the true gradient."""

_SIMPLEST_FIRST = ("one-process", "ddp", "torch-1f1b", "deepspeed-1f1b", "torch-interleaved", "torch-zbv")
_CLOSEST_FIRST = ("dsaux-al", "dsaux-penalty", "dsaux-local")
"""Decoupled methods by how near they come to the true gradient."""


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        prediction: the way that is advised; None where nothing fits.
        text: the advice and its reason.
    """

    prediction: Prediction | None
    text: str


def advise(best: Sequence[Prediction], *, devices: int) -> Advice:
    """Advise one of the contestants.

    Args:
        best: each contestant at its best, those alone that fit into memory.
        devices: how many there are.
    """
    exact = _preferred([its for its in best if its.is_exact], _SIMPLEST_FIRST)
    decoupled = _preferred([its for its in best if not its.is_exact], _CLOSEST_FIRST)
    if exact is None and decoupled is None:
        return Advice(None, "Nothing fits into the devices' memory. Take more devices, or a smaller batch.")
    if decoupled is None or (exact is not None and decoupled.samples_per_s < WORTH * exact.samples_per_s):
        assert exact is not None
        return Advice(exact, _exact_words(exact, decoupled, best=best, devices=devices))
    return Advice(decoupled, _decoupled_words(decoupled, exact))


def way(prediction: Prediction) -> str:
    """A contestant and its shape: "dsaux-al with 4 stages x 2 replicas, 1 micro-batch"."""
    batches = f"{prediction.micro_batches:,} micro-batch{'es' * (prediction.micro_batches != 1)}"
    if prediction.contestant == "one-process":
        return f"one process with {batches}"
    if prediction.contestant == "ddp":
        return f"DDP on {count(prediction.replicas, 'device')} with {batches}"
    shape = f"{count(prediction.stages, 'stage')} x {count(prediction.replicas, 'replica')}"
    return f"{prediction.contestant} with {shape}, {batches}"


def _preferred(predictions: Sequence[Prediction], names: Sequence[str]) -> Prediction | None:
    """The first by name of those that are as good as fastest."""
    if not predictions:
        return None
    enough = AS_FAST * max(its.samples_per_s for its in predictions)
    order = {name: place for place, name in enumerate(names)}
    fast = [its for its in predictions if its.samples_per_s >= enough]
    return min(fast, key=lambda its: (order.get(its.contestant, len(order)), -its.samples_per_s))


def _exact_words(exact: Prediction, decoupled: Prediction | None, *, best: Sequence[Prediction], devices: int) -> str:
    text = f"Use {way(exact)}: {_rate(exact)}, exact, and {_percent(exact.idle_share)} of the time idle."
    if exact.contestant == "one-process" and devices > 1:
        text += " More devices would spend their time waiting for each other."
    fastest = max((its for its in best if its.is_exact), key=lambda its: its.samples_per_s)
    if fastest.contestant != exact.contestant:
        faster = fastest.samples_per_s / exact.samples_per_s - 1
        text += f" {fastest.contestant} would be {_percent(faster)} faster; this is simpler."
    if decoupled is None:
        return text
    ratio = decoupled.samples_per_s / exact.samples_per_s
    if ratio < 1:
        return f"{text} {decoupled.contestant} would reach {_percent(ratio)} of that."
    return (
        f"{text} {decoupled.contestant} would be {_percent(ratio - 1)} faster, too little for a method that does not "
        "compute the true gradient."
    )


def _decoupled_words(decoupled: Prediction, exact: Prediction | None) -> str:
    text = f"Use {way(decoupled)}: {_rate(decoupled)}"
    if exact is None:
        text += ", and no exact way fits into the devices' memory."
    else:
        ratio = decoupled.samples_per_s / exact.samples_per_s
        text += (
            f", {ratio:.2f} times the best exact way ({way(exact)}: {_rate(exact)}), whose devices are idle "
            f"{_percent(exact.idle_share)} of the time."
        )
    return f"{text} It is not exact: compare its accuracy with a twin under schedule 1f1b first."


def _rate(prediction: Prediction) -> str:
    return f"{throughput(prediction.samples_per_s)} samples/s"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
