"""Where processes meet, and what is said when they cannot."""

from __future__ import annotations

import socket

import pytest

from dsaux.config import ConfigError
from dsaux.launchers import LaunchedProcess
from dsaux.rendezvous import check_meeting_point, job_port, meeting_point

TASK = LaunchedProcess("srun", 1, 2, 0, 1, first_host="localhost", job=17)


def test_the_tasks_of_a_job_meet_at_its_first_host_and_a_port_of_its_number() -> None:
    environment: dict[str, str] = {}
    meeting_point(TASK, environment)
    assert environment == {"MASTER_ADDR": "localhost", "MASTER_PORT": str(job_port(17))}
    assert job_port(17) != job_port(18), "two jobs on one host"


def test_what_is_set_already_stays() -> None:
    environment = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    meeting_point(TASK, environment)
    assert environment == {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}


def test_a_node_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no scontrol to ask
    with pytest.raises(ConfigError, match=r"n1.invalid, the first node of this job, .* Set MASTER_ADDR"):
        meeting_point(LaunchedProcess("srun", 0, 2, 0, 1, first_host="n1.invalid", job=17), {})


def test_a_port_in_use_is_named_by_the_rank_that_would_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"MASTER_PORT {port} is in use"):
            check_meeting_point(is_first=True)
        check_meeting_point(is_first=False)
    check_meeting_point(is_first=True)


def test_an_address_that_is_none_is_refused_before_anybody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "nobody.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is 'nobody.invalid'"):
        check_meeting_point(is_first=False)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match=f"MASTER_PORT is '{port}'"):
        meeting_point(TASK, {"MASTER_PORT": port})
