"""The batch digest: in range, the same for equal batches, another one for the least change."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dsaux.data.guard import LARGEST_DIGEST, BatchGuard, batch_digest


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(dtype), torch.tensor([3, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8])
def test_equal_batches_have_equal_digests_for_any_type(dtype):
    inputs, labels = batch(dtype)
    assert batch_digest(inputs, labels) == batch_digest(inputs.clone(), labels.clone())


def test_digests_are_whole_numbers_that_float32_holds_and_never_zero():
    inputs, labels = batch()
    digests = {batch_digest(inputs + shift, labels) for shift in range(500)}
    assert all(isinstance(digest, int) and 1 <= digest <= LARGEST_DIGEST for digest in digests)
    assert all(int(torch.tensor(digest, dtype=torch.float32)) == digest for digest in digests)
    assert len(digests) > 490
    assert LARGEST_DIGEST == 2**24 - 1


@pytest.mark.parametrize("bit", [0, 7, 31])
@pytest.mark.parametrize("place", [0, 50, 95])
def test_a_single_bit_changes_the_digest(place, bit):
    inputs, labels = batch()
    changed = inputs.clone()
    word = changed.view(torch.int32).reshape(-1)
    word[place] ^= -(2**31) if bit == 31 else 1 << bit
    assert batch_digest(changed, labels) != batch_digest(inputs, labels)


def test_a_changed_label_changes_the_digest():
    inputs, labels = batch()
    assert batch_digest(inputs, labels + torch.tensor([0, 1])) != batch_digest(inputs, labels)


def test_the_order_of_the_samples_counts():
    inputs, labels = batch()
    assert batch_digest(inputs.flip(0), labels) != batch_digest(inputs, labels)
    assert batch_digest(inputs, labels.flip(0)) != batch_digest(inputs, labels)


def test_shape_and_type_count():
    inputs, labels = batch()
    assert batch_digest(inputs.reshape(2, 48), labels) != batch_digest(inputs, labels)
    zeros = torch.zeros(4, 4)
    assert batch_digest(zeros, labels) != batch_digest(zeros.to(torch.int32), labels)


def test_memory_layout_does_not_count():
    inputs, labels = batch()
    assert batch_digest(inputs.to(memory_format=torch.channels_last), labels) == batch_digest(inputs, labels)


def test_a_tensor_with_gradient_is_fine():
    inputs, labels = batch()
    assert batch_digest(inputs.clone().requires_grad_(), labels) == batch_digest(inputs, labels)


def test_another_process_gets_the_same_digest():
    code = (
        "import torch; from dsaux.data.guard import batch_digest\n"
        "x = torch.arange(96.).reshape(2, 3, 4, 4); print(batch_digest(x, torch.tensor([3, 5])))"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert int(other.stdout) == batch_digest(*batch())


def test_batches_that_the_ranks_see_in_different_ticks_are_compared_when_they_have_come() -> None:
    guard = BatchGuard([0, 2], every=100)
    guard.add([None, 0], [0.0, 0.0, 7.0])
    guard.add([0, 1], [7.0, 0.0, 0.0])
    guard.add([None, 100], [0.0, 0.0, 8.0])
    with pytest.raises(RuntimeError, match=r"in step 100 \(rank 0: 000009, rank 2: 000008\)"):
        guard.add([100, 101], [9.0, 0.0, 0.0])


def test_ranks_of_other_replicas_are_not_compared() -> None:
    BatchGuard([0, 2], every=1).add([5, 5], [7.0, 9.0, 7.0])


@pytest.mark.parametrize(("every", "due"), [(0, [0]), (2, [0, 2, 4]), (1, [0, 1, 2, 3, 4])])
def test_the_first_step_is_always_due(every: int, due: list[int]) -> None:
    assert [step for step in range(5) if BatchGuard([0, 1], every=every).is_due(step)] == due
    assert not BatchGuard([0, 1], every=every).is_due(None)
    assert not BatchGuard([0], every=every).is_due(0), "one rank has nobody to compare with"
