"""The two loaders: equal batches, batches that stay the caller's, and failures that are seen."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsaux.config import ConfigError
from dsaux.data import batch_digest, torch_loader
from dsaux.data import test_batches as share_of_test_set
from dsaux.data.stream import Batch, Loader, LoaderJob, Rows, TrainPlan
from dsaux.data.torch_loader import WorkerLoader
from tests.unit.test_stream import equal, numbered_dataset, stream_of, take

ROOT = Path(__file__).parents[2]


def job_for(plan: Any = None) -> LoaderJob:
    dataset = numbered_dataset()
    plan = plan or TrainPlan(
        dataset.num_train,
        augmentation=dataset.augmentation(is_on=True),
        seed=0,
        replica=0,
        num_replicas=1,
        micro_batch_size=8,
        micro_batches_per_step=1,
    )
    return LoaderJob(
        images=dataset.padded_train_images,
        labels=dataset.train_labels,
        plan=plan,
        batch_size=8,
        margin=8,
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device("cpu"),
    )


def load_many(loader: Loader, count: int) -> list[Batch]:
    return [loader.load() for _ in range(count)]


class BrokenPlan:
    """Good for three batches; then, after a pause, it raises, or ends the process it runs in."""

    def __init__(self, *, end_process: bool, pause_s: float = 0.0) -> None:
        self.inner, self.end_process, self.pause_s = job_for().plan, end_process, pause_s

    def rows(self, position: int) -> Rows:
        if position == 3:
            time.sleep(self.pause_s)
            if self.end_process:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("no such image")
        return self.inner.rows(position)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_dali_and_torch_give_the_same_batches(augment, micro_batches):
    pytest.importorskip("nvidia.dali")
    dataset = numbered_dataset()
    arguments: dict[str, Any] = {
        "augment": augment,
        "micro_batches_per_step": micro_batches,
        "num_replicas": 2,
    }
    ours = take(stream_of(dataset, loader="torch", replica=1, **arguments), 15)
    dali = take(stream_of(dataset, loader="dali", replica=1, **arguments), 15)
    for (inputs, labels), (dali_inputs, dali_labels) in zip(ours, dali, strict=True):
        assert torch.equal(labels, dali_labels)
        assert dali_labels.dtype == torch.int64
        assert torch.allclose(inputs, dali_inputs, rtol=0, atol=1e-5)  # order of float32 operations


def test_dali_gives_bit_identical_batches_with_any_number_of_threads():
    pytest.importorskip("nvidia.dali")
    from dsaux.data.dali import DaliLoader

    one, two = DaliLoader(job_for(), num_threads=1), DaliLoader(job_for(), num_threads=2)
    assert equal(load_many(one, 15), load_many(two, 15))


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_two_processes_get_identical_digests(loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    code = (
        "from tests.unit.test_stream import numbered_dataset, stream_of, take\n"
        "from dsaux.data import batch_digest\n"
        f"print([batch_digest(*b) for b in take(stream_of(numbered_dataset(), loader={loader!r}), 14)])\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True, cwd=ROOT
    )
    mine = [batch_digest(*batch) for batch in take(stream_of(numbered_dataset(), loader=loader), 14)]
    assert other.stdout.strip().splitlines()[-1] == str(mine)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_batch_stays_as_it_is_while_later_ones_are_loaded(loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    stream = stream_of(numbered_dataset(), loader=loader)
    kept = take(stream, 8)
    copies = [tuple(part.clone() for part in batch) for batch in kept]
    kept[0][0].mul_(2)  # the caller may write into its own
    take(stream, 12)
    stream.close()
    assert equal(kept[1:], copies[1:])
    assert torch.equal(kept[0][0], 2 * copies[0][0])


def test_loading_leaves_the_images_as_they_are():
    dataset = numbered_dataset()
    before = dataset.padded_train_images.copy()
    for inputs, _ in take(stream_of(dataset), 12):
        inputs.zero_()
    assert (dataset.padded_train_images == before).all()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_give_the_same_batches_in_order(workers):
    dataset = numbered_dataset()
    stream = stream_of(dataset, workers=workers)
    reference = take(stream_of(dataset), 20)
    assert equal(take(stream, 14), reference[:14])
    stream.seek(3)
    assert equal(take(stream, 5), reference[3:8])
    stream.close()


def test_worker_processes_leave_the_global_random_state_alone():
    stream = stream_of(numbered_dataset(), workers=1)
    before = torch.get_rng_state()
    take(stream, 3)
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("end_process", "pause_s", "words"),
    [
        pytest.param(False, 0, "no such image", id="raises"),
        pytest.param(True, 0, "a worker process of the torch loader ended before", id="ends with batches under way"),
        pytest.param(True, 4, "a worker process of the torch loader ended before", id="ends while it is waited for"),
        pytest.param(False, 60, "have been silent for 3 s. Look at the disk", id="hangs"),
    ],
)
def test_a_failing_worker_raises_and_does_not_hang(end_process, pause_s, words):
    # In a process of its own: PyTorch raises the death of a worker from a signal handler, wherever Python is then.
    call = f"read(end_process={end_process}, pause_s={pause_s})"
    script = f"from tests.unit.test_loaders import read_with_a_failing_worker as read; {call}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert words in last, done.stderr


def read_with_a_failing_worker(*, end_process: bool, pause_s: float) -> None:
    """Ends with the error that the loader raises."""
    torch_loader.WORKER_TIMEOUT_S = 3 if pause_s > 10 else 120
    load_many(WorkerLoader(job_for(BrokenPlan(end_process=end_process, pause_s=pause_s)), workers=1), 6)


def test_a_failing_source_of_dali_raises():
    pytest.importorskip("nvidia.dali")
    from dsaux.data.dali import DaliLoader

    loader = DaliLoader(job_for(BrokenPlan(end_process=False)))
    with pytest.raises(KeyError, match="no such image"):
        load_many(loader, 6)
    loader.close()


def test_dali_has_batches_under_way_while_the_caller_works():
    pytest.importorskip("nvidia.dali")
    from dsaux.data.dali import PREFETCH, DaliLoader

    loader = DaliLoader(job_for())
    loader.load()
    assert 1 <= len(loader._under_way) <= PREFETCH


def test_the_threads_of_dali_end_with_the_iteration():
    pytest.importorskip("nvidia.dali")

    def evaluate() -> int:
        batches = share_of_test_set(
            numbered_dataset(), loader="dali", replica=0, num_replicas=1, batch_size=8, device="cpu"
        )
        assert len(list(batches)) == 5
        return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()

    first = evaluate()
    assert max(evaluate() for _ in range(5)) <= first


def test_missing_dali_is_refused_and_never_replaced(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "nvidia.dali" else found(name, *rest)
    )
    with pytest.raises(ConfigError, match="NVIDIA DALI is not installed"):
        stream_of(numbered_dataset(), loader="dali")
    with pytest.raises(ConfigError, match="NVIDIA DALI is not installed"):
        share_of_test_set(numbered_dataset(), loader="dali", replica=0, num_replicas=1, batch_size=8, device="cpu")


def test_dali_that_cannot_be_imported_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr("dsaux.data.stream.require_dali", lambda: None)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"NVIDIA DALI cannot be imported: .*Reinstall"):
        stream_of(numbered_dataset(), loader="dali")


def test_dali_with_worker_processes_is_refused():
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ConfigError, match=r"dsaux\.data\.workers is 2"):
        stream_of(numbered_dataset(), loader="dali", workers=2)
