"""A cable between two hosts of this machine (network namespaces), whose rate can be set; needs root."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.hosts.network import INTERFACE, Host, two_hosts, why_not

LATENCY_MS = 200
"""Longest time that a packet waits in the shaper's queue before it is dropped."""


class Cable:
    """The cable between two hosts.

    Attributes:
        namespaces: names of the hosts' network namespaces.
        address: of the first host.
        interface: name of either end.
    """

    def __init__(self, hosts: tuple[Host, Host]) -> None:
        self._hosts, self._is_shaped = hosts, False
        self.namespaces = tuple(host.namespace for host in hosts)
        self.address, self.interface = hosts[0].address, INTERFACE

    def shape(self, mbit: float | None) -> None:
        """Let so many megabits a second through, in each direction; None lets all through."""
        for host in self._hosts:
            if self._is_shaped:
                host.call("tc", "qdisc", "del", "dev", INTERFACE, "root")
            if mbit is not None:
                burst = max(32, round(mbit * 1000 / 8 / 250))  # kilobytes: what passes in a timer's period
                rate = ["rate", f"{mbit:g}mbit", "burst", f"{burst}kb", "latency", f"{LATENCY_MS}ms"]
                host.call("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *rate)
        self._is_shaped = mbit is not None


def why_no_cable() -> str | None:
    """Why there can be no two hosts with a shaped cable here; None where there can."""
    if shutil.which("tc") is None:
        return "tc is not installed (Debian: iproute2)"
    return why_not()


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """Make two hosts and a cable, and take them away behind the block."""
    with two_hosts() as hosts:
        yield Cable(hosts)
