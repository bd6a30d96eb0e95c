"""docs/coming_from.md says what is true: what it calls refused is refused, its keys and links are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dsaux.config import ConfigError, check_launch, config_from_dict
from tests.unit.test_readme import README

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
OPTIMIZER = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}}


def config(**changes: Any) -> Any:
    pipeline = {"dsaux": {"pipeline": {"stages": 2}}}
    return config_from_dict({"train_batch_size": 8, **OPTIMIZER, **pipeline, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": {"type": "StepLR", "params": {}}},
        {"scheduler": {"type": "ExponentialLR", "params": {}}},
        {"train_batch_size": "auto"},
        {"train_micro_batch_size_per_gpu": "auto"},
        {"gradient_clipping": "auto"},
        {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "norm_weight_decay": 0.0}}},
        {"fp16": {"enabled": True}},
        {"torch_autocast": {"enabled": True}},
        {"zero_optimization": {"stage": 1}},  # with SGD, and without zero_allow_untested_optimizer
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        {"pipeline": {"stages": 4}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"sequence_parallel_size": 2},
        {"expert_parallel": {"enabled": True}},
        {"data_efficiency": {"enabled": True}},
        {"compile": {"deepcompile": True}},
        {"elasticity": {"enabled": True}},
        {"checkpoint": {"tag_validation": "Warn"}},
        {"gradient_cliping": 1.0},
    ],
    ids=str,
)
def test_what_the_page_calls_refused_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 5}}},
        {"bf16": {"enabled": True}},
        {"gradient_clipping": 0},
        {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
        {"gradient_accumulation_steps": 4},
        {"pipeline": {"stages": 2}},
    ],
    ids=str,
)
def test_what_the_page_offers_instead_is_allowed(changes: dict[str, Any]) -> None:
    config(**changes)


def test_its_keys_are_in_the_readmes_table_and_its_links_lead_somewhere() -> None:
    keys = re.findall(r"`(dsaux\.(?:model|data|pipeline|aux|run)\.\w+)", PAGE)
    assert keys
    assert [key for key in keys if f"| `{key}` |" not in README] == []
    assert [target for target in re.findall(r"\]\(([^)#]+)", PAGE) if not (ROOT / "docs" / target).exists()] == []


@pytest.mark.parametrize("key", ["cutout", "rand_augment"])
def test_augmentation_of_images_in_memory_is_refused_for_files(tmp_path: Path, key: str) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(128):  # a global batch
            (tmp_path / split / "a" / f"{number}.png").touch()
    data = {"name": "folder", "root": str(tmp_path), key: 5}
    files = config(train_batch_size=128, dsaux={"data": data, "pipeline": {"stages": 2}})
    with pytest.raises(ConfigError, match=rf"dsaux\.data\.{key} is 5 but folder has"):
        check_launch(files, world_size=2)
