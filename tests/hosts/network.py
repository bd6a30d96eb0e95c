"""Two hosts on this machine: two network namespaces with names of their own and one cable between them.

    dsaux-a 10.77.0.1 [eth0] ======== [eth0] 10.77.0.2 dsaux-b

A process in one of them sees the other's address and nothing of this machine's network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_NETNS_FILES = Path("/etc/netns")
NAMES = ("dsaux-a", "dsaux-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NOBODY = "10.77.0.9"
INTERFACE = "eth0"


@dataclass(frozen=True)
class Host:
    """One of the two.

    Attributes:
        name: host name.
        address: of its end of the cable.
        namespace: name for `ip netns`.
    """

    name: str
    address: str
    namespace: str

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` as it is started on this host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        return ["ip", "netns", "exec", self.namespace, *named]

    def call(self, *command: str) -> None:
        """Run a command of `ip` and the like in the namespace."""
        _call("ip", "netns", "exec", self.namespace, *command)


def why_not() -> str | None:
    """Why there can be no two hosts here; None where there can."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"dsaux-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    _call("ip", "netns", "del", name)
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make the hosts, and take them away behind the block."""
    hosts = tuple(Host(name, address, f"{name}-{os.getpid()}") for name, address in zip(NAMES, ADDRESSES, strict=True))
    first, second = hosts
    try:
        for host in hosts:
            _call("ip", "netns", "add", host.namespace)
            files = _NETNS_FILES / host.namespace  # ip puts them in the place of those in /etc
            files.mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"{other.address} {other.name}" for other in hosts)]
            (files / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        ends = ["name", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second.namespace]
        _call("ip", "-n", first.namespace, "link", "add", *ends)
        for host in hosts:
            _call("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _call("ip", "-n", host.namespace, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
            shutil.rmtree(_NETNS_FILES / host.namespace, ignore_errors=True)
        with contextlib.suppress(OSError):
            _NETNS_FILES.rmdir()  # ours, if nothing else is in it


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
