"""Export: what is written computes what the layers of the checkpoint compute, and what is wrong is not written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux import ConfigError, model_file
from dsaux.assemble import BATCHNORM_STREAM_SEED_OFFSET
from dsaux.command import run
from dsaux.data import ReplicaStream, load_dataset, test_batches
from dsaux.export import ExportError, export_run, load_model, main
from dsaux.model_file import FORMATS, read_model
from dsaux.models import network as network_file
from dsaux.models import resnet
from dsaux.trained import recorded_evaluation
from tests.saved_run import NUM_CLASSES, chain, layout, random_layers, run_config, write_checkpoint, write_run

ENDINGS = {"torch": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run of resnet8 with one checkpoint, evaluated but with no record of it."""
    run_dir = write_run(tmp_path / "run", "resnet8")
    write_checkpoint(run_dir, random_layers("resnet8"), step=12)
    return run_dir


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def assert_same_scores(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest score: another order of sums in float32, convolution and BatchNorm in one."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


def evaluate(layers: list[nn.Module]) -> dict[str, Any]:
    """An "eval" event with the layers' figures over the test set."""
    dataset = load_dataset(run_config("resnet8").dsaux.data)
    (batch,) = test_batches(dataset, loader="torch", replica=0, num_replicas=1, batch_size=50, device="cpu")
    scores = chain(layers, batch[0])
    return {
        "event": "eval",
        "step": 12,
        "method": "penalty",
        "top1": float((scores.argmax(dim=1) == batch[1]).double().mean()),
        "loss": float(F.cross_entropy(scores, batch[1])),
        "samples": 50,
    }


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("model", ["resnet8", "resnet18", "wrn10_1"])
def test_a_file_of_each_format_computes_what_the_layers_compute(tmp_path: Path, model: str, form: str) -> None:
    layers = random_layers(model)
    run_dir = write_run(tmp_path / "run", model)
    write_checkpoint(run_dir, layers, step=12)
    exported = export_run(run_dir, tmp_path / f"model{ENDINGS[form]}")
    assert exported.format == form
    assert exported.difference <= 1e-5
    card, scorer = read_model(exported.path)
    assert (card.model, card.step, card.num_classes, card.image_size, card.classes) == (model, 12, 10, 16, None)
    for count in (1, 5):
        with torch.no_grad():
            assert_same_scores(scorer(images(count)), chain(layers, images(count)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [exported.path.name, "run"]


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_the_weights_are_the_layers_own_under_nested_names(saved: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "model"
    export_run(saved, path, format=form)
    if form == "torch":
        state = torch.load(path, weights_only=True)["state_dict"]
    else:
        from safetensors.torch import load_file

        state = load_file(path)
    names = ["stem", "group1.block1", "group2.block1", "group3.block1", "head"]
    layers = zip(names, random_layers("resnet8"), strict=True)
    expected = {f"{name}.{key}": value for name, layer in layers for key, value in layer.state_dict().items()}
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert not load_model(path).training


def test_a_torch_file_holds_all_that_is_needed_to_use_it(saved: Path, tmp_path: Path) -> None:
    export_run(saved, tmp_path / "model.pt")
    document = torch.load(tmp_path / "model.pt", weights_only=True)
    dataset = load_dataset(run_config("resnet8").dsaux.data)
    assert set(document) == {
        "format", "model", "num_classes", "in_channels", "image_size", "mean", "std", "classes", "step",
        "dsaux_version", "shorter_side", "state_dict", "args", "context", "vocabulary",
    }  # fmt: skip
    assert (document["format"], document["model"], document["step"]) == ("dsaux", "resnet8", 12)
    assert (document["mean"], document["std"]) == (dataset.mean, dataset.std)


def test_an_onnx_file_holds_the_same_as_texts_and_no_path_of_this_machine(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_run(saved, path)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [("images", ["batch", 3, 16, 16])]
    assert [(entry.name, entry.shape) for entry in session.get_outputs()] == [("scores", ["batch", NUM_CLASSES])]
    texts = session.get_modelmeta().custom_metadata_map
    dataset = load_dataset(run_config("resnet8").dsaux.data)
    assert tuple(json.loads(texts["mean"])) == dataset.mean
    assert (texts["format"], texts["classes"]) == ("dsaux", "null")
    assert b"dsaux/models" not in path.read_bytes()
    with pytest.raises(ConfigError, match="onnxruntime"):
        load_model(path)


def test_bf16_weights_are_written_as_float32(tmp_path: Path) -> None:
    layers = random_layers("resnet8")
    for parameter in nn.ModuleList(layers).parameters():
        parameter.data = parameter.data.bfloat16()
    run_dir = write_run(tmp_path / "run", "resnet8")
    write_checkpoint(run_dir, layers, step=12)
    export_run(run_dir, tmp_path / "model.pt")
    weight = load_model(tmp_path / "model.pt").get_submodule("head.fc").weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, layers[-1].fc.weight.float())  # type: ignore[union-attr, operator]


def test_names_of_torchvision_go_out_and_come_back(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_file, "PUBLIC_KEYS", {"resnet": lambda key: key.replace("head.fc", "fc")})
    export_run(saved, tmp_path / "model.pt")
    assert "fc.weight" in torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    assert_same_scores(load_model(tmp_path / "model.pt")(images(2)), chain(random_layers("resnet8"), images(2)))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_taken_or_the_named_one(saved: Path, tmp_path: Path) -> None:
    write_checkpoint(saved, random_layers("resnet8", seed=1), step=24)
    damaged = write_checkpoint(saved, random_layers("resnet8", seed=2), step=36)
    (damaged / "layer_01-model_states.pt").write_bytes(b"")
    newest = export_run(saved, tmp_path / "newest.pt").trained
    assert newest.card.step == 24
    assert "step_00000036" in newest.warnings[0]
    assert export_run(saved, tmp_path / "named.pt", checkpoint="step_00000012").trained.card.step == 12


def test_a_checkpoint_of_another_network_is_refused(saved: Path, tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(saved, random_layers("resnet20"), step=24)
    assert run(main, [str(saved), "--out", str(tmp_path / "model.pt")]) == 1
    assert "11 layers" in capsys.readouterr().err
    assert not (tmp_path / "model.pt").exists()


# ---- evaluation and BatchNorm ---------------------------------------------------------------------------------------


def test_the_runs_own_evaluation_is_found_again(tmp_path: Path, capsys: Any) -> None:
    layers = random_layers("resnet8")
    run_dir = write_run(tmp_path / "run", "resnet8", evaluate(layers))
    write_checkpoint(run_dir, layers, step=12)
    assert run(main, [str(run_dir), "--out", str(tmp_path / "model.pt")]) == 0
    shown = capsys.readouterr().out
    assert "equal to the run's own evaluation" in shown
    assert "scores" in shown


def test_a_small_difference_is_said_and_a_large_one_refused(tmp_path: Path, capsys: Any) -> None:
    layers = random_layers("resnet8")
    event = evaluate(layers)
    run_dir = write_run(tmp_path / "run", "resnet8", {**event, "loss": event["loss"] * 1.001})
    write_checkpoint(run_dir, layers, step=12)
    arguments = [str(run_dir), "--out", str(tmp_path / "model.pt")]
    assert run(main, arguments) == 0
    assert "the run's own evaluation gave" in capsys.readouterr().out
    (tmp_path / "model.pt").unlink()
    write_run(run_dir, "resnet8", {**event, "loss": event["loss"] * 1.2})
    assert run(main, arguments) == 1
    assert "--reestimate" in capsys.readouterr().err
    assert not (tmp_path / "model.pt").exists()


def test_the_last_record_of_a_step_counts_and_a_torn_line_does_not_matter(tmp_path: Path) -> None:
    event = {"event": "eval", "step": 12, "method": "al", "top1": 0.5, "loss": 1.0, "samples": 9}
    final = {"event": "final", "steps": 24, "test_accuracy": 0.7, "test_loss": 0.9, "test_samples": 9}
    again = {**event, "top1": 0.6, "method": "saved network"}
    run_dir = write_run(tmp_path, "resnet8", event, {**event, "loss": 2.0}, again, final)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "eval", "st')
    at_12, at_24 = recorded_evaluation(run_dir, 12), recorded_evaluation(run_dir, 24)
    assert at_12 is not None
    assert at_24 is not None
    assert (at_12.top1, at_12.loss) == (0.5, 2.0)
    assert (at_24.top1, at_24.loss) == (0.7, 0.9)
    assert recorded_evaluation(run_dir, 36) is None


@pytest.mark.parametrize("replicas", [1, 2])
def test_statistics_of_a_checkpoint_without_evaluation_are_estimated_anew(
    tmp_path: Path, capsys: Any, replicas: int
) -> None:
    run_dir, layers = write_run(tmp_path / "run", "resnet8"), random_layers("resnet8")
    dealt = layout(len(layers), replicas=replicas)
    write_checkpoint(run_dir, layers, step=12, is_evaluated=False, layout=dealt)
    assert run(main, [str(run_dir), "--out", str(tmp_path / "model.pt")]) == 0
    shown = capsys.readouterr().out
    assert "no evaluation at this step is on record" in shown
    assert "estimated anew on 2 batches" in shown
    found = load_model(tmp_path / "model.pt").get_submodule("stem.1")
    # What the first BatchNorm sees depends on the first convolution alone.
    means, variances = [], []
    for replica in range(replicas):
        stream = ReplicaStream(
            load_dataset(run_config("resnet8").dsaux.data),
            loader="torch",
            seed=BATCHNORM_STREAM_SEED_OFFSET,
            replica=replica,
            num_replicas=replicas,
            micro_batch_size=16,
            micro_batches_per_step=1,
            device="cpu",
        )
        for _ in range(2):
            outputs = layers[0][0](next(stream)[0]).transpose(0, 1).flatten(1).double()  # type: ignore[index]
            means.append(outputs.mean(dim=1))
            variances.append(outputs.var(dim=1))
    # Sums of 4,096 float32 values against float64.
    torch.testing.assert_close(found.running_mean.double(), torch.stack(means).mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.running_var.double(), torch.stack(variances).mean(dim=0), rtol=1e-5, atol=1e-6)


def test_statistics_can_be_kept_and_the_user_is_warned(tmp_path: Path) -> None:
    run_dir, layers = write_run(tmp_path / "run", "resnet8"), random_layers("resnet8")
    write_checkpoint(run_dir, layers, step=12, is_evaluated=False, is_drained=False)
    trained = export_run(run_dir, tmp_path / "model.pt", reestimate=False).trained
    assert torch.equal(trained.network.get_submodule("stem.1").running_mean, layers[0][1].running_mean)  # type: ignore[index]
    assert len(trained.warnings) == 2
    assert "under way" in trained.warnings[0]
    assert "AuxNet" in trained.warnings[1]


# ---- what is wrong --------------------------------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_removed_and_the_old_one_kept(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def write_wrong(network: nn.Module, card: Any, path: Path) -> None:
        wrong = random_layers("resnet8", seed=1)[-1]
        network.get_submodule("head").load_state_dict(wrong.state_dict())
        FORMATS["safetensors"].write(network, card, path)  # type: ignore[arg-type]
        network.get_submodule("head").load_state_dict(random_layers("resnet8")[-1].state_dict())

    wrong = replace(FORMATS["safetensors"], write=write_wrong)
    monkeypatch.setattr("dsaux.export.FORMATS", {**FORMATS, "safetensors": wrong})
    out = tmp_path / "model.safetensors"
    out.write_text("old")
    assert run(main, [str(saved), "--out", str(out), "--force"]) == 1
    assert "differ from the network's" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "run"]


def test_a_network_that_has_gone_astray_is_refused(tmp_path: Path) -> None:
    layers = random_layers("resnet8")
    head = layers[-1]
    assert isinstance(head, resnet.Head)
    nn.init.constant_(head.fc.bias, float("nan"))
    run_dir = write_run(tmp_path / "run", "resnet8")
    write_checkpoint(run_dir, layers, step=12)
    with pytest.raises(ExportError, match="astray"):
        export_run(run_dir, tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}/nowhere", "--out", "{tmp}/m.pt"], "is not a folder"),
        (["{tmp}", "--out", "{tmp}/m.pt"], "has no config.json"),
        (["{tmp}/empty", "--out", "{tmp}/m.pt"], "holds no checkpoint"),
        (["{tmp}/run", "--out", "{tmp}/m.pt", "--checkpoint", "step_00000013"], "Did you mean step_00000012?"),
        (["{tmp}/empty", "--out", "{tmp}/m.pt", "--checkpoint", "final"], "It has none at all."),
        (["{tmp}/run", "--out", "{tmp}/m.pt", "--format", "onxx"], "Did you mean onnx?"),
        (["{tmp}/run", "--out", "{tmp}/m.bin"], "or give --format"),
        (["{tmp}/run", "--out", "{tmp}/none/m.pt"], "there is no folder"),
        (["{tmp}/run", "--out", "{tmp}/run", "--format", "torch"], "is a folder"),
        (["{tmp}/run", "--out", "{tmp}/there.pt"], "--force"),
        (["{tmp}/run"], "--out"),
        (["{tmp}/run", "--out", "{tmp}/m.pt", "--fast"], "--fast"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    saved: Path, tmp_path: Path, capsys: Any, arguments: list[str], says: str
) -> None:
    write_run(tmp_path / "empty", "resnet8")
    (tmp_path / "there.pt").write_text("old")
    assert run(main, [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert says in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run", "there.pt"]


def test_missing_packages_are_named_with_the_command_to_install_them(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        model_file.importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else real(name, *rest)
    )
    with pytest.raises(ConfigError, match="pip install onnx onnxscript onnxruntime"):
        export_run(saved, tmp_path / "model.onnx")


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsaux.export", str(tmp_path), "--out", "model.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
