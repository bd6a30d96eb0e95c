"""Users' own networks: what is taken, what is refused, and that weights come from the seed alone."""

from __future__ import annotations

import gc
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsaux.config import Config, ConfigError, ModelConfig, check_launch, config_from_dict
from dsaux.models import Layer, boundary_specs, build_layer, build_layers, layer_names
from dsaux.models.causality import looks_causal, run_layers, with_causality
from dsaux.models.custom import is_nonnegative
from dsaux.models.network import Network
from dsaux.models.shapes import SampleSpec
from dsaux.module import NamedLayerSpec

IMAGE = SampleSpec((3, 8, 8))
TEXT = SampleSpec((6,), causal=True, vocabulary=11)

GOOD = """
from collections import OrderedDict
from torch import nn
from dsaux.models import Layer

def net(*, num_classes, input_spec, width=4):
    return nn.Sequential(OrderedDict(
        first=nn.Sequential(nn.Conv2d(input_spec.shape[0], width, 3), nn.ReLU()),
        second=nn.Conv2d(width, width, 3),
        head=nn.Sequential(nn.Flatten(), nn.Linear(16 * width, num_classes)),
    ))

def listed(*, num_classes, input_spec):
    return [
        Layer("a", lambda: nn.Conv2d(3, 4, 3)),
        ("b", lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())),
        ("head", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))),
    ]

number = 3
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a user's file into the working directory of the test."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "mine.py") -> None:
        (tmp_path / name).write_text(textwrap.dedent(text))

    return write_file


def document(name: str, **changes: Any) -> Config:
    dsaux: dict[str, Any] = {
        "model": {"name": name},
        "data": {"name": "photos", "loader": "torch", "image_size": 8, "train_samples": 36, "test_samples": 18},
        "pipeline": {"stages": 2, "schedule": "al"},
    }
    for block, values in changes.items():
        dsaux.setdefault(block, {}).update(values)
    return config_from_dict(
        {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "dsaux": dsaux}
    )


def test_a_sequential_and_a_list_are_taken_with_their_names_and_properties(write: Any) -> None:
    write(GOOD)
    for name, names, signs in (
        ("mine.py:net", ["first", "second", "head"], [True, False, False]),
        ("mine.py:listed", ["a", "b", "head"], [False, True, False]),
    ):
        layers = build_layers(name, num_classes=5, input_spec=IMAGE)
        assert [layer.name for layer in layers] == layer_names(name, num_classes=5, input_spec=IMAGE) == names
        assert [layer.nonnegative for layer in layers] == signs
        assert Network(layers)(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
        assert [spec.shape for spec in boundary_specs(layers, input_spec=IMAGE)] == [(4, 6, 6), (4, 4, 4), (5,)]


def test_args_reach_the_function(write: Any) -> None:
    write(GOOD)
    layers = build_layers(ModelConfig("mine.py:net", args={"width": 7}), num_classes=5, input_spec=IMAGE)
    assert boundary_specs(layers, input_spec=IMAGE)[0].shape == (7, 6, 6)


def test_a_module_is_found_from_the_working_directory_and_the_path_stays_as_it_was(write: Any) -> None:
    write(GOOD, "package_of_mine.py")
    before = list(sys.path)
    assert len(build_layers("package_of_mine:net", num_classes=5, input_spec=IMAGE)) == 3
    assert sys.path == before
    del sys.modules["package_of_mine"]


def test_files_beside_the_file_can_be_imported_and_the_path_stays_as_it_was(write: Any) -> None:
    write("WIDTH = 4", "beside_mine.py")
    write(GOOD + "\nfrom beside_mine import WIDTH\n")
    before = list(sys.path)
    build_layers("mine.py:net", num_classes=5, input_spec=IMAGE)
    assert sys.path == before
    del sys.modules["beside_mine"]


@pytest.mark.parametrize("function", ["net", "listed"])
def test_weights_come_from_the_seed_alone_however_the_network_is_cut(write: Any, function: str) -> None:
    write(GOOD)

    def build(indices: list[int], seed: int) -> dict[int, torch.Tensor]:
        layers = build_layers(f"mine.py:{function}", num_classes=5, input_spec=IMAGE)
        torch.manual_seed(len(indices))
        return {i: next(build_layer(layers[i], i, seed=seed).parameters()) for i in indices}

    whole = build([0, 1, 2], 3)
    for part in ([0], [1, 2], [2, 1]):
        for index, weight in build(part, 3).items():
            assert torch.equal(weight, whole[index])
    assert not torch.equal(build([1], 4)[1], whole[1])


def test_children_that_another_stage_holds_are_freed(write: Any) -> None:
    write(GOOD)
    layers = build_layers("mine.py:net", num_classes=5, input_spec=IMAGE)
    whole = layers[0].whole
    assert whole is not None
    mine = NamedLayerSpec(layers[1], 1, seed=0).build()
    others = [weakref.ref(child) for child in whole._built.values()]
    assert len(others) == 2
    whole.release()
    gc.collect()
    assert [other() for other in others] == [None, None]
    assert next(mine.parameters()).device.type == "cpu"


WRONG = {
    "no such file": ("", "other.py:net", "there is no file other.py in"),
    "no such module": ("", "no_such_module_here:net", "cannot be imported: ModuleNotFoundError"),
    "no function named": ("", "mine.py:", "is written path/to/file.py:function"),
    "no such function": ("def nett(): pass", "mine.py:net", "has no net. Did you mean nett?"),
    "not callable": ("net = 3", "mine.py:net", "net is a int"),
    "the file fails": ("1 / 0", "mine.py:net", "fails when it is imported: ZeroDivisionError: division by zero"),
    "the function fails": (
        "def net(**kw):\n    raise ValueError('no\\nwidth')",
        "mine.py:net",
        "failed: ValueError: no width. Mend it.",
    ),
    "another result": ("def net(**kw): return 5", "mine.py:net", "gave a int; it must give an nn.Sequential"),
    "no layers": ("def net(**kw): return []", "mine.py:net", "gave no layers"),
    "a made module in a list": (
        "from torch import nn\ndef net(**kw): return [('a', nn.ReLU())]",
        "mine.py:net",
        "entry 0 of its list is a tuple",
    ),
    "a function that makes no module": (
        "def net(**kw): return [('a', lambda: 3)]",
        "mine.py:net",
        'the function of its layer "a" gave a int',
    ),
    "fewer layers than stages": (
        "from torch import nn\ndef net(*, num_classes, **kw):\n"
        "    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes)))",
        "mine.py:net",
        "dsaux.pipeline.stages is 2 but mine.py:net has 1 layers",
    ),
    "equal names": (
        "from torch import nn\ndef net(**kw): return [('a', nn.ReLU), ('a', nn.ReLU)]",
        "mine.py:net",
        'two layers are named "a"',
    ),
    "a layer named as a group": (
        "from torch import nn\ndef net(**kw): return [('a', nn.ReLU), ('a.b', nn.ReLU)]",
        "mine.py:net",
        'layer "a" is named like a group',
    ),
    "a shape that does not fit": (
        "from torch import nn\ndef net(**kw):\n"
        "    return [('a', lambda: nn.Conv2d(3, 4, 3)), ('b', lambda: nn.Conv2d(5, 4, 3))]",
        "mine.py:net",
        'layer "b" does not take what comes before it, a sample of shape (4, 6, 6): RuntimeError',
    ),
    "another number of classes": (
        "from torch import nn\ndef net(**kw): return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))",
        "mine.py:net",
        'the last layer, "1", gives a sample of shape (7,), but this data set needs scores of shape (18,)',
    ),
    "a lazy module": (
        "from torch import nn\ndef net(*, num_classes, **kw):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))",
        "mine.py:net",
        'layer "1" has a lazy module',
    ),
    "a shared module": (
        "from torch import nn\ndef net(*, num_classes, **kw):\n    one = nn.Conv2d(3, 3, 1)\n"
        "    return nn.Sequential(one, one, nn.Flatten(), nn.Linear(192, num_classes))",
        "mine.py:net",
        'layers "0" and "1" share weights or a module',
    ),
    "a shared weight": (
        "from torch import nn\ndef net(*, num_classes, **kw):\n    a, b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)\n"
        "    b.weight = a.weight\n    return nn.Sequential(a, b, nn.Flatten(), nn.Linear(192, num_classes))",
        "mine.py:net",
        'layers "0" and "1" share weights or a module',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_is_one_line_before_any_process_group(write: Any, case: str) -> None:
    text, name, says = WRONG[case]
    write(text)
    with pytest.raises(ConfigError) as caught:
        check_launch(document(name), world_size=2)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_args_of_a_network_that_takes_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dsaux\.model\.args .* takes none"):
        document("resnet8", model={"args": {"width": 3}})


def test_args_that_dsaux_gives_itself_are_refused(write: Any) -> None:
    write(GOOD)
    with pytest.raises(ConfigError, match=r"dsaux\.model\.args\.num_classes is given by dsaux itself"):
        check_launch(document("mine.py:net", model={"args": {"num_classes": 3}}), world_size=2)


def test_a_given_cut_that_no_segment_reaches_is_refused_before_any_process_group(write: Any) -> None:
    write(
        "from torch import nn\ndef net(*, num_classes, **kw):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Linear(5, num_classes))"
    )
    with pytest.raises(ConfigError, match=r"dsaux\.pipeline\.partition is \[2\], but boundary 0 lies between shapes"):
        check_launch(document("mine.py:net", pipeline={"partition": [2]}), world_size=2)
    check_launch(document("mine.py:net", pipeline={"partition": [2], "schedule": "1f1b"}), world_size=2)


SEGMENT = """
from torch import nn
def segment(source, target, *, depth, width, first):
    return nn.Sequential(nn.Conv2d(source.shape[0], target.shape[0], 3), nn.Upsample(tuple(target.shape[1:])))
def broken(source, target, *, depth, width, first):
    return nn.Conv2d(3, 9, 1)
"""


def test_segments_of_ones_own(write: Any) -> None:
    from dsaux.models.auxnet import build_aux_net

    write(GOOD + SEGMENT)
    cut = {"partition": ["second"]}
    check_launch(document("mine.py:net", pipeline=cut, aux={"segment": "mine.py:segment"}), world_size=2)
    net = build_aux_net([IMAGE, SampleSpec((4, 6, 6))], segment="mine.py:segment", seed=1)
    assert net(torch.zeros(2, 3, 8, 8))[0].shape == (2, 4, 6, 6)
    again = build_aux_net([IMAGE, SampleSpec((4, 6, 6))], segment="mine.py:segment", seed=1)
    for one, two in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ConfigError, match=r"makes \(9, 8, 8\) of a sample of shape .* needs \(4, 6, 6\)"):
        check_launch(document("mine.py:net", pipeline=cut, aux={"segment": "mine.py:broken"}), world_size=2)
    with pytest.raises(ConfigError, match="has no missing"):
        check_launch(document("mine.py:net", aux={"segment": "mine.py:missing"}), world_size=2)
    with pytest.raises(ConfigError, match='Did you mean "light"'):
        document("mine.py:net", aux={"segment": "lihgt"})


# ---- properties of layers ------------------------------------------------------------------------------------------


def test_nonnegative_is_what_ends_in_such_a_function_or_says_so() -> None:
    stated, denied = nn.Linear(1, 1), nn.ReLU()
    stated.nonnegative, denied.nonnegative = True, False
    ends = [
        nn.ReLU(),
        nn.ReLU6(),
        nn.Sigmoid(),
        nn.Hardsigmoid(),
        nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU())),
    ]
    assert all(is_nonnegative(module) for module in [*ends, stated])
    unknown = nn.Module()
    unknown.relu = nn.ReLU()  # the last child, but nobody knows when it is called
    others = [nn.Linear(1, 1), nn.GELU(), nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), nn.Sequential(), denied, unknown]
    assert not any(is_nonnegative(module) for module in others)


class Attention(nn.Module):
    """Attention whose last weight starts at zero, as is common; with or without a mask."""

    def __init__(self, is_causal: bool, *, zero: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.is_causal = is_causal
        if zero:
            nn.init.zeros_(self.inner.out_proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((6, 6), float("-inf")).triu(1) if self.is_causal else None
        return x + self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


class Shift(nn.Module):
    """Token t gets what stands at t + 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, 1:], x[:, :1]], dim=1)


class Ahead(nn.Module):
    """The first token alone looks at the third."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1] + x[:, 2:3], x[:, 1:]], dim=1)


TOKENS = SampleSpec((6, 8))


@pytest.mark.parametrize(
    ("module", "is_causal"),
    [
        (nn.Linear(8, 8), True),
        (nn.Dropout(0.5), True),
        (Attention(True), True),
        (Attention(False), False),
        (Attention(False, zero=True), False),
        (Shift(), False),
        (Ahead(), False),
    ],
)
def test_a_trial_tells_which_layers_look_ahead(module: nn.Module, is_causal: bool) -> None:
    before = torch.get_rng_state()
    assert looks_causal(module, TOKENS) is is_causal
    assert torch.equal(torch.get_rng_state(), before)
    assert looks_causal(nn.Embedding(11, 8), TEXT)


def chain(*middle: Any) -> list[Layer]:
    return [
        Layer("embedding", lambda: nn.Embedding(11, 8)),
        *(Layer(f"m{i}", make) for i, make in enumerate(middle)),
        Layer("head", lambda: nn.Linear(8, 11)),
    ]


def test_layers_behind_one_that_looks_ahead_have_no_causal_boundary() -> None:
    layers = chain(lambda: nn.Linear(8, 8), lambda: Attention(False), lambda: nn.Linear(8, 8))
    found = with_causality(layers, input_spec=TEXT, network="n")
    specs = boundary_specs(found, input_spec=TEXT)
    assert [spec.causal for spec in specs] == [True, True, False, False, False]


class OnlyInTraining(nn.Module):
    """Cannot be tried in eval mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise NotImplementedError("no eval mode")
        return x


def test_a_layer_that_cannot_be_tried_must_say_so_itself() -> None:
    with pytest.raises(ConfigError, match=r'whether layer "m0" looks at later tokens .*no eval mode.*causal = True'):
        with_causality(chain(OnlyInTraining), input_spec=TEXT, network="n")

    def stated() -> nn.Module:
        module = OnlyInTraining()
        module.causal = True
        return module

    assert with_causality(chain(stated), input_spec=TEXT, network="n")[1].causal


def test_only_a_run_with_an_aux_net_asks_whether_layers_look_ahead(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    write(
        "from torch import nn\ndef net(*, num_classes, input_spec):\n"
        "    return nn.Sequential(nn.Embedding(input_spec.vocabulary, 8), nn.Linear(8, 8), nn.Linear(8, num_classes))"
    )
    asked: list[str] = []
    monkeypatch.setattr("dsaux.models.causality.looks_causal", lambda *args: asked.append("") or True)
    for schedule, stages, count in (("1f1b", 2, 0), ("al", 1, 0), ("al", 2, 2), ("penalty", 3, 2)):
        asked.clear()
        config = document("mine.py:net", pipeline={"schedule": schedule, "stages": stages})
        run_layers(config.dsaux, num_classes=11, input_spec=TEXT)
        assert len(asked) == count
