"""torchvision's networks as layers: equal outputs and gradients, and weights that go both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux import ConfigError
from dsaux.config import ModelConfig
from dsaux.export import export_run
from dsaux.models import boundary_specs, build_layers, layer_names
from dsaux.models.naming import TORCHVISION_BLOCKS
from dsaux.models.network import build_network, load_public_state_dict, public_key, public_state_dict
from tests.saved_run import NUM_CLASSES, random_layers, write_checkpoint, write_run

CLASSES = 7
# Weights come from torchvision's own initialization, so sums of thousands of float64 products differ by rounding only.
TOLERANCE = 1e-10


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def original(model: str, **options: bool) -> nn.Module:
    network: nn.Module = getattr(torchvision.models, model)(weights=None, num_classes=CLASSES, **options)
    return network


def assert_close(found: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_output_and_gradients_are_those_of_torchvisions_network(model: str) -> None:
    torch.manual_seed(0)
    theirs = original(model).double()
    ours = build_network(model, num_classes=CLASSES, input_spec=(3, 64, 64)).double()
    load_public_state_dict(ours, theirs.state_dict(), model=model)
    images, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.arange(2)
    expected, found = theirs(images), ours(images)
    assert_close(found, expected)
    F.cross_entropy(expected, labels).backward()
    F.cross_entropy(found, labels).backward()
    gradients = {public_key(model, name): parameter.grad for name, parameter in ours.named_parameters()}
    assert set(gradients) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert_close(gradients[name], parameter.grad)
    # BatchNorm's running statistics have moved alike.
    for name, tensor in public_state_dict(ours, model).items():
        assert_close(tensor.double(), theirs.state_dict()[name].double())


@pytest.mark.parametrize("model", list(TORCHVISION_BLOCKS))
def test_names_and_shapes_of_all_tensors_are_torchvisions(model: str) -> None:
    with torch.device("meta"):
        theirs = original(model).state_dict()
        ours = public_state_dict(build_network(model, num_classes=CLASSES), model)
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}


def test_a_state_dict_goes_there_and_back() -> None:
    theirs = original("resnet18")
    ours = build_network("resnet18", num_classes=CLASSES)
    state = dict(reversed(theirs.state_dict().items()))  # the order does not matter
    load_public_state_dict(ours, state, model="resnet18")
    back = public_state_dict(ours, "resnet18")
    assert set(back) == set(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.items())
    original("resnet18").load_state_dict(back)


def test_names_of_layers_are_torchvisions_with_stem_and_head() -> None:
    names = layer_names("resnet50")
    assert (names[0], names[1], names[3], names[-2], names[-1]) == ("stem", "layer1.0", "layer1.2", "layer4.2", "head")
    assert len(names) == 1 + 16 + 1
    assert len(layer_names("resnet152")) == 52


def test_only_the_head_has_outputs_of_both_signs() -> None:
    specs = boundary_specs(build_layers("resnet18", num_classes=CLASSES), input_spec=(3, 64, 64))
    assert [spec.nonnegative for spec in specs] == [True] * 9 + [False]
    assert [spec.shape for spec in specs[::2]] == [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_weights_start_as_torchvisions_do(model: str) -> None:
    """Same distribution, tensor by tensor; with zero_init the same BatchNorms start at 0."""
    torch.manual_seed(0)
    theirs = original(model, zero_init_residual=True).state_dict()
    settings = ModelConfig(name=model, zero_init=True)
    ours = public_state_dict(build_network(settings, num_classes=CLASSES), model)
    for key, expected in theirs.items():
        if expected.dim() == 4:
            # n samples: the standard deviation is known to 1/sqrt(2n), here within 4 of its errors on both sides
            tolerance = 8 / (2 * expected.numel()) ** 0.5
            assert float(ours[key].std()) == pytest.approx(float(expected.std()), rel=tolerance)
        elif not key.startswith("fc."):
            assert torch.equal(ours[key], expected)
    zeros = [key for key, tensor in ours.items() if key.endswith("weight") and not tensor.any()]
    assert len(zeros) == sum(TORCHVISION_BLOCKS[model])


def test_old_files_without_batchnorms_counters_are_taken() -> None:
    state = {key: tensor for key, tensor in original("resnet18").state_dict().items() if "num_batches" not in key}
    network = build_network("resnet18", num_classes=CLASSES)
    network.get_buffer("stem.bn1.num_batches_tracked").fill_(3)
    load_public_state_dict(network, state, model="resnet18")
    assert network.get_buffer("stem.bn1.num_batches_tracked") == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fc.weight": None}, 'the tensor "fc.weight" is missing of resnet18'),
        ({"fc.extra": torch.zeros(1)}, 'the tensor "fc.extra" is no part of resnet18'),
        ({"fc.bias": torch.zeros(1000)}, r'"fc.bias" has the wrong shape .* \(1000,\) in place of \(7,\)'),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(
    change: dict[str, Tensor | None], says: str
) -> None:
    network = build_network("resnet18", num_classes=CLASSES)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = {**original("resnet18").state_dict(), **change}
    with pytest.raises(ValueError, match=says):
        load_public_state_dict(network, {k: v for k, v in state.items() if v is not None}, model="resnet18")
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_an_exported_network_loads_into_torchvisions(tmp_path: Path) -> None:
    layers = random_layers("resnet18")
    run_dir = write_run(tmp_path / "run", "resnet18")
    write_checkpoint(run_dir, layers, step=12)
    export_run(run_dir, tmp_path / "model.pt")
    theirs = torchvision.models.resnet18(num_classes=NUM_CLASSES)
    theirs.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"])
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        # the same operations in the same order
        assert torch.equal(theirs.eval()(images), nn.Sequential(*layers).eval()(images))


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dsaux\.model\.dropout is 0\.3, which resnet18 cannot use"):
        layer_names(ModelConfig(name="resnet18", dropout=0.3))
