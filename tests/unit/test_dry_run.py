"""The dry run: what it counts is what real layers have, and every configuration of the project can be built."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dsaux.config import ConfigError, check_launch, load_config
from dsaux.dry_run import DryRun, plan, show
from dsaux.memory import states_per_parameter
from dsaux.models import build_layers
from dsaux.models.cost import chain_cost
from dsaux.models.shapes import SampleSpec

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
IMAGE = SampleSpec((3, 32, 32))


def dry_run_of(path: Path, *, processes: int = 0, overrides: tuple[str, ...] = ()) -> DryRun:
    config = load_config(path, overrides=overrides)
    launch = check_launch(config, world_size=processes or config.dsaux.pipeline.stages, needs_data=False)
    return plan(config, launch, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests ask what is built, not how fast it is."""
    monkeypatch.setattr("dsaux.partition.WARMUP_RUNS", 0)
    monkeypatch.setattr("dsaux.partition.TIMED_RUNS", 1)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_configuration_can_be_built_and_cut(path: Path) -> None:
    dry = dry_run_of(path)
    assert len(dry.stages) == dry.launch.stages
    assert sum(len(stage.names) for stage in dry.stages) == dry.bounds[-1]
    assert sum(stage.layers.parameters for stage in dry.stages) == dry.network.parameters
    assert (dry.aux_net is None) == (dry.config.dsaux.pipeline.schedule == "1f1b" or dry.launch.stages == 1)
    assert dry.step_s > 0
    out = io.StringIO()
    show(dry, Console(file=out, width=200))
    assert f"{dry.network.parameters:,} parameters" in out.getvalue()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dsaux.data.name=imagenet", "dsaux.data.rand_augment=9"), "dsaux.data.rand_augment is 9 but imagenet has"),
        (
            ("dsaux.data.name=imagenet", "dsaux.data.image_size=2048"),
            "dsaux.data.image_size is 2048; imagenet can be made",
        ),
        (("dsaux.data.name=cifar10", "dsaux.data.image_size=224"), "cifar10 has images of 32 x 32 pixels"),
        (("dsaux.data.augment=false", "dsaux.data.cutout=8"), "dsaux.data.augment is false, so it has no effect"),
        (("dsaux.data.loader=dali", "dsaux.data.workers=2"), "dsaux.data.workers is 2 but dsaux.data.loader is"),
        (("dsaux.data.test_samples=3",), "dsaux.data.test_samples is 3, fewer than the 18 classes of photos"),
        (("dsaux.data.name=cifar10", "dsaux.data.test_samples=3"), "fewer than the 10 classes of cifar10"),
    ],
)
def test_what_a_run_would_refuse_without_looking_at_files_is_refused(overrides: tuple[str, ...], message: str) -> None:
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    with pytest.raises(ConfigError, match=message):
        dry_run_of(path, overrides=overrides)


def test_what_is_kept_for_the_backward_pass_is_what_real_layers_keep() -> None:
    layers, batch = build_layers("resnet8", num_classes=10), 4
    modules = [layer.make() for layer in layers]
    own = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(batch, *IMAGE.shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for module in modules:
            x = module(x)
    real = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values()) / batch
    cost = chain_cost([layer.make for layer in layers], input_spec=IMAGE)
    # BatchNorm keeps two numbers a channel, whatever the batch: they are divided by another batch size
    assert cost.saved_numbers == pytest.approx(real, rel=0.01)
    assert cost.parameters == sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "params", "states"),
    [
        ("SGD", {"lr": 0.1}, 0),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, 1),
        ("AdamW", {"lr": 0.1, "fused": True}, 2),
        ("RMSprop", {"lr": 0.1, "centered": True, "momentum": 0.9}, 3),
    ],
)
def test_an_optimizer_is_asked_how_much_it_remembers(name: str, params: dict[str, float], states: int) -> None:
    assert states_per_parameter(name, params) == states


def test_1f1b_fills_the_pipeline_and_keeps_several_micro_batches() -> None:
    path = next(path for path in CONFIGS if path.stem == "resnet20_k3_1f1b")
    one = dry_run_of(path, overrides=("gradient_accumulation_steps=1",))
    four = dry_run_of(path, overrides=("gradient_accumulation_steps=4",))
    assert (one.ticks, four.ticks) == (3, 6)
    kept = [stage.memory.activations / (stage.layers.saved_numbers * 16 * 4) for stage in four.stages]
    assert kept == [3, 2, 1]  # 64 samples are four micro-batches of 16


def test_replicas_share_the_batch_and_zero_shares_the_optimizer() -> None:
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    one, two = (dry_run_of(path, processes=processes) for processes in (2, 4))
    assert two.launch.micro_batch_size * 2 == one.launch.micro_batch_size
    zero = dry_run_of(
        path, processes=4, overrides=('zero_optimization={"stage": 1}', "zero_allow_untested_optimizer=true")
    )
    assert zero.bounds == two.bounds or zero.network == two.network
    whole = [sum(stage.memory.optimizer for stage in dry.stages) for dry in (two, zero)]
    assert whole[1] == pytest.approx(whole[0] / 2, rel=1e-3)


def test_under_local_a_head_is_counted_with_its_stage_and_there_is_no_auxnet() -> None:
    path = next(path for path in CONFIGS if path.stem == "resnet20_k3")
    plain, local = (dry_run_of(path, overrides=(f"dsaux.pipeline.schedule={name}",)) for name in ("1f1b", "local"))
    assert local.aux_net is None
    assert {stage.aux_net for stage in local.stages} == {None}
    assert local.network == plain.network
    extra = sum(stage.layers.parameters for stage in local.stages) - local.network.parameters
    assert 0 < extra < local.network.parameters / 4
    assert [stage.memory.messages > 0 for stage in local.stages] == [True] * 3
    assert sum(stage.memory.messages for stage in plain.stages) == 0
