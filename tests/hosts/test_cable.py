"""The benchmark's cable between two hosts: ranks in namespaces of their own, a shaped link, bytes read off the wire."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
from crew import Crew, Order, Team, preload
from hosts import Cable, cable, why_no_cable
from work import model_work

pytestmark = pytest.mark.hosts


@pytest.fixture
def between() -> Iterator[Cable]:
    reason = why_no_cable()
    if reason is not None:
        pytest.skip(reason)
    with cable() as made:
        yield made


def qdisc(between: Cable) -> str:
    """What shapes the first host's end."""
    command = ["ip", "netns", "exec", between.namespaces[0], "tc", "qdisc", "show", "dev", between.interface]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_ranks_on_both_ends_of_a_shaped_cable_train_and_their_bytes_are_counted(between: Cable) -> None:
    make_work = functools.partial(model_work, "resnet8", image_size=8, global_batch=4)
    model = make_work().build(0, len(make_work().layers))
    gradient_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    preload()
    assert "tbf" not in qdisc(between)
    between.shape(200.0)
    assert "tbf" in qdisc(between)
    assert "rate 200Mbit" in qdisc(between)
    team = Team(
        "ddp",
        2,
        make_work,
        namespaces=between.namespaces,
        address=between.address,
        interface=between.interface,
    )
    with Crew(team) as crew:
        windows = crew.block(Order(micro_batches=1, bounds=(0, len(make_work().layers)), warmup=1, steps=4))
    between.shape(None)
    assert "tbf" not in qdisc(between)
    for window in windows:
        # Each of two ranks sends its gradient once in a ring all-reduce; frames and acknowledgements come on top.
        assert 2 * 4 * gradient_bytes < window.interface_bytes < 1.5 * 2 * 4 * gradient_bytes
