"""Sums of an evaluation batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dsaux.evaluate import classification_sums


def test_sums_count_loss_hits_and_samples() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1.0, 2, 3, 4, 5, 6, 7], [0.0, 0, 0, 9, 0, 0, 0]])
    labels = torch.tensor([0, 0, 3])  # first of all; last of seven; first of all
    loss, top1, top5, samples = classification_sums(scores, labels).tolist()
    assert (top1, top5, samples) == (2.0, 2.0, 3.0)
    assert loss == pytest.approx(F.cross_entropy(scores, labels, reduction="sum").item(), rel=1e-6)


def test_padding_rows_are_not_counted() -> None:
    scores, labels = torch.randn(6, 10), torch.tensor([3, -1, 2, -1, -1, 9])
    real = labels >= 0
    expected = F.cross_entropy(scores[real], labels[real], reduction="sum").double()
    loss, _, _, samples = classification_sums(scores, labels)
    assert samples == 3
    torch.testing.assert_close(loss, expected)


def test_fewer_than_five_classes_make_every_sample_a_top5_hit() -> None:
    _, _, top5, samples = classification_sums(torch.randn(8, 3), torch.randint(3, (8,))).tolist()
    assert top5 == samples == 8


def test_bf16_scores_are_summed_in_higher_precision() -> None:
    scores, labels = torch.randn(512, 4).bfloat16(), torch.randint(4, (512,))
    expected = F.cross_entropy(scores.float(), labels, reduction="sum").double()
    torch.testing.assert_close(classification_sums(scores, labels)[0], expected, rtol=1e-6, atol=0)
