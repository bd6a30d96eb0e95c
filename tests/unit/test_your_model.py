"""docs/your_model.md says what is true: its network, configuration and segment pass all checks and can be built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dsaux.config import check_launch, load_config
from dsaux.data import dataset_facts
from dsaux.dry_run import plan
from dsaux.models import boundary_specs, build_layer
from dsaux.models.auxnet import build_aux_net
from dsaux.models.causality import run_layers

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "your_model.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_ten_lines_pass_all_checks_and_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, segment = blocks("python")
    (document,) = blocks("json")
    assert len([line for line in network.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_net.py").write_text(network)
    (tmp_path / "my_segment.py").write_text(segment)
    (tmp_path / "my_net.json").write_text(document)
    for override in ([], ["dsaux.aux.segment=my_segment.py:segment", "dsaux.pipeline.partition=[2]"]):
        config = load_config("my_net.json", overrides=override)
        check_launch(config, world_size=2)
        facts = dataset_facts(config.dsaux.data)
        num_classes, spec = facts.num_classes, facts.input_spec
        layers = run_layers(config.dsaux, num_classes=num_classes, input_spec=spec)
        assert [layer.nonnegative for layer in layers] == [True] * 6 + [False]
        out = spec.random(2, device="cpu")
        for index, layer in enumerate(layers):
            out = build_layer(layer, index, seed=0)(out)
        assert out.shape == (2, num_classes)
        after = boundary_specs(layers, input_spec=spec)
        for cut in range(1, len(layers)):
            (made,) = build_aux_net([spec, after[cut - 1]], segment=config.dsaux.aux.segment)(
                spec.random(2, device="cpu")
            )
            assert tuple(made.shape[1:]) == after[cut - 1].shape


@pytest.mark.parametrize("override", ["dsaux.pipeline.partition=time", "dsaux.pipeline.schedule=penalty"])
def test_the_segment_serves_the_network_without_cuts_of_ones_own(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsaux.partition.WARMUP_RUNS", 0)
    monkeypatch.setattr("dsaux.partition.TIMED_RUNS", 1)
    network, segment = blocks("python")
    (document,) = blocks("json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_net.py").write_text(network)
    (tmp_path / "my_segment.py").write_text(segment)
    (tmp_path / "my_net.json").write_text(document)
    config = load_config("my_net.json", overrides=["dsaux.aux.segment=my_segment.py:segment", override])
    dry = plan(config, check_launch(config, world_size=2, needs_data=False), device=torch.device("cpu"))
    assert 1 <= dry.bounds[1] <= 6


def test_every_link_and_configuration_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for name in re.findall(r"`(\w+\.json)`", PAGE):
        assert name == "my_net.json" or (ROOT / "ds_configs" / name).exists(), name
