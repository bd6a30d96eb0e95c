"""The messages between neighbouring stages, on two gloo ranks without an engine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from dsaux.transfers import VariableReceiver, VariableSender, WaitMeter, boundary_groups
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.multiprocess

LARGE = (64, 64, 64, 64)
"""64 MiB in float32: far more than the sockets hold, so that a send can't end before it is received."""


@pytest.mark.parametrize(("transport", "exact"), [("full", True), ("bf16", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_read_is_what_was_written(transport: str, exact: bool, dtype: torch.dtype) -> None:
    found, sent = run_ranks(exchange, 2, (3, 4, 5), dtype, transport)
    for one, two in zip(found, sent, strict=True):
        for (variable, scale), (written, its_scale) in zip(one, two, strict=True):
            assert variable.shape == written.shape
            assert scale == its_scale
            np.testing.assert_allclose(variable, written, rtol=0 if exact else 2**-8)


def test_large_messages_are_sent_while_both_ends_go_on() -> None:
    found, sent = run_ranks(exchange, 2, LARGE, torch.float32, "full")
    assert np.array_equal(found[-1][-1][0], sent[-1][-1][0])


def exchange(shape: tuple[int, ...], dtype: torch.dtype, transport: str) -> list[list[tuple[np.ndarray, float]]]:
    """Three batches of two micro-batches from rank 1 to rank 0; what each has read or written."""
    rank, device = torch.distributed.get_rank(), torch.device("cpu")
    group = boundary_groups([[0, 1]])[0, 1]
    common: dict[str, Any] = {"group": group, "micro_batches": 2, "transport": transport, "meter": WaitMeter(device)}
    generator = torch.Generator().manual_seed(0)
    batches = [[(torch.randn(shape, generator=generator, dtype=dtype), 0.1 * n) for n in (1, 2)] for _ in range(3)]
    if rank == 1:
        sender = VariableSender(peer=0, **common)
        for batch in batches:
            sender.wait()
            for micro, (variable, scale) in enumerate(batch):
                sender.write(micro, variable, scale=scale)
            sender.start()
        sender.wait()
        return [[(variable.numpy(), scale) for variable, scale in batch] for batch in batches]
    receiver, found = VariableReceiver(peer=1, device=device, **common), []
    receiver.post()
    for index in range(3):
        receiver.wait()
        read = [receiver.read(micro) for micro in (0, 1)]
        found.append([(variable.numpy().copy(), float(scale)) for variable, scale in read])
        if index < 2:
            receiver.post()
    return found


def test_a_micro_batch_of_another_size_is_refused() -> None:
    with pytest.raises(RankError, match=r"shape \(2, 3\), but the first one had 12 entries"):
        run_ranks(write_two_sizes, 2)


def write_two_sizes() -> None:
    group = boundary_groups([[0, 1]])[0, 1]
    if torch.distributed.get_rank() == 0:
        return
    meter = WaitMeter(torch.device("cpu"))
    sender = VariableSender(peer=0, group=group, micro_batches=1, transport="full", meter=meter)
    sender.write(0, torch.zeros(3, 4), scale=1.0)
    sender.write(0, torch.zeros(2, 3), scale=1.0)


def test_waits_are_counted_where_they_are_lost() -> None:
    early, late = run_ranks(one_is_late, 2)
    assert early > late


def one_is_late() -> float:
    """Rank 0 waits for a message that rank 1 sends 1 s later."""
    rank, device = torch.distributed.get_rank(), torch.device("cpu")
    meter = WaitMeter(device)
    common: dict[str, Any] = {"group": boundary_groups([[0, 1]])[0, 1], "micro_batches": 1, "meter": meter}
    if rank == 0:
        receiver = VariableReceiver(peer=1, transport="full", device=device, **common)
        receiver.post()
        torch.distributed.barrier()
        receiver.wait()
    else:
        sender = VariableSender(peer=0, transport="full", **common)
        torch.distributed.barrier()
        time.sleep(1.0)
        sender.write(0, torch.zeros(4), scale=1.0)
        sender.start()
        sender.wait()
    waited = meter.take_s()
    assert meter.take_s() == 0.0
    return waited
