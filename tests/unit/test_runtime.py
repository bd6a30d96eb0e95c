"""Where a process stands, how cores are shared, and how a run ends."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dsaux.config import ConfigError
from dsaux.runtime import Place

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os,
        "environ",
        {key: value for key, value in os.environ.items() if key not in VARIABLES and not key.startswith("SLURM_")},
    )


def test_without_variables_this_is_the_only_process() -> None:
    place = Place.from_environment()
    assert (place.rank, place.world_size, place.local_rank) == (0, 1, 0)
    assert os.environ["WORLD_SIZE"] == "1", "what starts later must see the same place"


def test_a_launchers_variables_are_read() -> None:
    os.environ.update(
        RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="n1", MASTER_PORT="29500"
    )
    place = Place.from_environment()
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "needs RANK, WORLD_SIZE and LOCAL_RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "as whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "ranks go from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "for 4 tasks .* would train alone"),
    ],
)
def test_a_contradictory_environment_is_refused(variables: dict[str, str], message: str) -> None:
    os.environ.update(variables)
    with pytest.raises(ConfigError, match=message):
        Place.from_environment()


@pytest.mark.parametrize(
    ("body", "code", "last_line"),
    [
        ("pass", 0, None),
        ("raise ConfigError('beta is -1')", 2, "error: beta is -1"),
        ("raise RuntimeError('lost')", 1, "error: RuntimeError: lost"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise DivergedError('the loss is nan in step 3')", 1, "error: the loss is nan in step 3"),
    ],
)
def test_exit_code_and_last_line_of_a_run(body: str, code: int, last_line: str | None) -> None:
    names = "from dsaux.runtime import run_and_exit, ConfigError\nfrom dsaux.watch_rules import DivergedError"
    script = f"{names}\ndef main():\n    {body}\nrun_and_exit(main)"
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert (lines[-1] if lines else None) == (
        None if last_line is None else f"[rank 0 on {os.uname().nodename}] {last_line}"
    )
    assert ("Traceback" in done.stderr) == ("RuntimeError" in body), "for errors of the program alone"


def test_a_thread_in_the_background_does_not_turn_the_end_of_a_finished_run_into_an_abort() -> None:
    script = """
import atexit, threading, time
import torch
from dsaux.runtime import run_and_exit

def spin():  # in and out of native code, which gives the interpreter's lock away and takes it back
    x = torch.zeros(64, 64)
    while True:
        x = x @ x

def main():
    atexit.register(print, "registered")
    threading.Thread(target=spin, daemon=True).start()
    time.sleep(0.2)
    threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
    print("done")

if __name__ == "__main__":
    run_and_exit(main)
"""
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stdout.split("\n")) == (0, ["done", "waited for", "registered", ""]), done.stderr


def test_cores_are_divided_among_the_processes_of_a_host() -> None:
    script = (
        "from dsaux.runtime import Place, share_cores; import os\n"
        "cores = len(os.sched_getaffinity(0))\n"
        "assert share_cores(Place(0, 0, 2, 2, 'here')) == max(1, cores // 2)\n"
        "assert share_cores(Place(0, 0, 64, 64, 'here')) == max(1, cores // 64)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_memory_that_a_tensor_has_freed_is_kept_for_the_next_one() -> None:
    script = """
import resource, sys, torch
from dsaux.runtime import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
torch.set_num_threads(1)
def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = []
for _ in range(9):
    before = page_faults()
    torch.ones(2**24)  # 64 MiB: more than glibc ever keeps by itself
    faults.append(page_faults() - before)
print(sorted(faults)[4])  # not the mean: something small may come to lie in the way of one of them
"""
    faults = {}
    for name in ("keep", "leave"):
        command = [sys.executable, "-c", script, name]
        faults[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults["leave"] > 2**10, "else there is nothing to keep"
    assert faults["keep"] < faults["leave"] / 10, faults
