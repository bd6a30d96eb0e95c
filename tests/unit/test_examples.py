"""The example networks: the ViT is torchvision's, the GPT looks at earlier symbols alone; both can be exported."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from dsaux.config import ConfigError, ModelConfig, config_from_dict
from dsaux.config_rules import show
from dsaux.export import export_run, load_model
from dsaux.models import build_layer, build_layers
from dsaux.models.shapes import SampleSpec
from dsaux.predict import main as predict
from tests.saved_run import layout, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
GPT = {"name": "examples/gpt.py:gpt", "args": {"layers": 2, "heads": 2, "dim": 16}}
TEXT = SampleSpec((12,), causal=True, vocabulary=97)


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are named from the repository's root."""
    monkeypatch.chdir(ROOT)


def test_the_vit_is_torchvisions_in_outputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from vit import cut

    torch.manual_seed(0)
    whole = VisionTransformer(
        image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    ).double()
    for weight in whole.parameters():  # torchvision's head starts at zero
        torch.nn.init.normal_(weight, std=0.3)
    ours = cut(copy.deepcopy(whole))
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    outputs = [network(images) for network in (whole, ours)]
    for output in outputs:
        F.cross_entropy(output, labels).backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)  # float64, the same operations
    names = {
        "conv_proj": "0.conv_proj", "class_token": "0.class_token", "encoder.pos_embedding": "0.pos_embedding",
        "encoder.layers.encoder_layer_0": "1", "encoder.layers.encoder_layer_1": "2",
        "encoder.layers.encoder_layer_2": "3", "encoder.ln": "4.ln", "heads": "4.heads",
    }  # fmt: skip
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    for name, weight in whole.named_parameters():
        start = max((prefix for prefix in names if name.startswith(prefix)), key=len)
        gradient = gradients.pop(names[start] + name.removeprefix(start))
        assert gradient is not None
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-10, atol=1e-10)
    assert not gradients, "every weight of ours is one of torchvision's"


def test_the_vit_has_torchvisions_own_weights_for_a_seed() -> None:
    settings = ModelConfig("examples/vit.py:vit", args={"layers": 2, "heads": 2, "dim": 16})
    layers = build_layers(settings, num_classes=5, input_spec=SampleSpec((3, 32, 32)))
    assert [layer.name for layer in layers] == ["0", "1", "2", "3"]
    modules = [build_layer(layer, index, seed=0) for index, layer in enumerate(layers)]
    assert float(modules[0].pos_embedding.detach().std()) == pytest.approx(0.02, rel=0.2)  # 1040 draws
    out = torch.zeros(2, 3, 32, 32)
    for module in modules:
        out = module(out)
    assert torch.equal(out, torch.zeros(2, 5)), "torchvision's head starts at zero"


def test_the_gpt_predicts_from_earlier_symbols_alone() -> None:
    layers = build_layers(ModelConfig(**GPT), num_classes=97, input_spec=TEXT)
    modules = [build_layer(layer, index, seed=0).eval() for index, layer in enumerate(layers)]

    def scores(x: torch.Tensor) -> torch.Tensor:
        for module in modules:
            x = module(x)
        return x

    plain = TEXT.random(1, device="cpu")
    other = plain.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 97
    assert scores(plain).shape == (1, 12, 97)
    assert torch.equal(scores(plain)[:, :7], scores(other)[:, :7])
    assert not torch.equal(scores(plain)[:, 7:], scores(other)[:, 7:])


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the GPT that has saved random weights."""
    run = tmp_path_factory.mktemp("text") / "run"
    run.mkdir()
    config = config_from_dict(
        {
            "train_batch_size": 4,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "dsaux": {
                "model": GPT,
                "data": {"name": "text", "loader": "torch", "context": 12, "train_samples": 8, "test_samples": 9},
                "pipeline": {"stages": 2, "partition": "uniform"},
                "run": {"bn_batches": 2, "eval_batch_size": 4},
            },
        }
    )
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "metrics.jsonl").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        layers = build_layers(config.dsaux.model, num_classes=97, input_spec=TEXT)
        modules = [build_layer(layer, index, seed=1) for index, layer in enumerate(layers)]
    write_checkpoint(run, modules, step=2, layout=layout(len(modules)))
    return run


@pytest.mark.parametrize("ending", ["pt", "safetensors", "onnx"])
def test_a_network_for_text_is_exported_and_says_how_it_was_built(text_run: Path, tmp_path: Path, ending: str) -> None:
    exported = export_run(text_run, tmp_path / f"model.{ending}")
    card = exported.trained.card
    assert (card.model, card.args, card.context, card.vocabulary) == (GPT["name"], GPT["args"], 12, 97)
    assert exported.evaluation.samples == 9 * 12
    assert exported.difference <= 1e-5
    assert exported.trained.batchnorm == "none in this network"
    if ending != "onnx":
        assert load_model(exported.path)(TEXT.random(2, device="cpu")).shape == (2, 12, 97)


def test_a_file_whose_function_is_gone_says_which(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_run(text_run, tmp_path / "model.pt").path
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("dsaux_user_gpt")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"there is no file examples/gpt\.py in"):
        load_model(path)


def test_predict_refuses_a_network_for_text(text_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a network for text, and dsaux\.predict looks at image files"):
        predict([str(text_run), "photo.jpg"])


@pytest.mark.parametrize("key", ["dsaux.model.args", "dsaux.data.context"])
def test_a_run_goes_on_with_the_same_args_and_context_only(key: str) -> None:
    from dsaux.launch_check import Launch
    from dsaux.resume import _check_agreement

    def config(**changes: Any) -> Any:
        dsaux: dict[str, Any] = {
            "model": {**GPT, **changes.get("model", {})},
            "data": {"name": "text", "loader": "torch", **changes.get("data", {})},
            "pipeline": {"stages": 2},
        }
        return config_from_dict(
            {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "dsaux": dsaux}
        )

    launch = Launch(2, 2, 1, 4, 4, 1)
    content = {"config": config().to_dict(), "train_batch_size": 4}
    _check_agreement(content, config(), launch, source=Path("run"))
    other = config(model={"args": {"layers": 3}}) if key.endswith("args") else config(data={"context": 32})
    with pytest.raises(ConfigError) as caught:
        _check_agreement(content, other, launch, source=Path("run"))
    assert str(caught.value).startswith(f"{key} is ")
    del content["config"]["dsaux"]["data"]["context"]  # as an older version wrote it
    _check_agreement(content, config(), launch, source=Path("run"))
    assert show(GPT["args"])
