"""The tables of DeepSpeed's keys equal what the installed DeepSpeed and PyTorch read: a new version is"
" noticed here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from dsaux import ds_keys, ds_optim_keys
from dsaux.config_deepspeed import check_deepspeed
from dsaux.config_rules import ConfigError, Rule

READ_BY_INITIALIZE = {"sequence_parallel_size", "data_parallel_size"}
"""Keys that `deepspeed.initialize` reads, not its configuration."""


def _paths(keys: Mapping[str, Rule], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Rule]]:
    for key, rule in keys.items():
        yield (*above, key), rule
        yield from _paths(rule.keys, (*above, key))


MODELS: dict[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
"""Blocks that DeepSpeed reads with pydantic."""


class Recorder(dict[str, Any]):
    """A block of a configuration that remembers which keys were asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return _RecordedKeys(self)

    def __copy__(self) -> Recorder:
        return self

    def __deepcopy__(self, memo: Any) -> Recorder:
        return self


class _RecordedKeys:
    """`key in block.keys()` counts as asking as well."""

    def __init__(self, block: Recorder) -> None:
        self.block = block

    def __contains__(self, key: object) -> bool:
        return key in self.block

    def __iter__(self) -> Any:
        return iter(list(dict.keys(self.block)))


@pytest.fixture(scope="module")
def read() -> dict[str, Recorder]:
    """What DeepSpeed asked for in the top level ("") and in the blocks that are not pydantic models."""
    blocks = {
        "activation_checkpointing": Recorder(),
        "flops_profiler": Recorder(),
        "data_types": Recorder(),
        "timers": Recorder(),
        "optimizer": Recorder(type="SGD", params={}),
        "scheduler": Recorder(type="WarmupLR", params={}),
    }
    top = Recorder(train_batch_size=2, **blocks)
    DeepSpeedConfig(top)
    return {"": top, **blocks}


def _fields(model: type[DeepSpeedConfigModel]) -> set[str]:
    """Keys that a pydantic block takes: names of its fields and their aliases."""
    names = set(model.model_fields)
    return names | {field.alias for field in model.model_fields.values() if field.alias}


def _keys_of(path: str) -> set[str]:
    rules = ds_keys.TOP_LEVEL_KEYS
    for key in path.split("."):
        rules = rules[key].keys
    return set(rules)


def test_top_level_keys_are_those_that_deepspeed_reads(read: dict[str, Recorder]) -> None:
    assert set(ds_keys.TOP_LEVEL_KEYS) == read[""].asked | READ_BY_INITIALIZE


@pytest.mark.parametrize("key", sorted(READ_BY_INITIALIZE))
def test_key_is_read_by_initialize(key: str) -> None:
    assert f'"{key}"' in inspect.getsource(deepspeed.initialize)


@pytest.mark.parametrize(
    "path",
    [
        "activation_checkpointing",
        "flops_profiler",
        "data_types",
        "timers",
        "optimizer",
        "scheduler",
    ],
)
def test_keys_of_a_block_are_those_that_deepspeed_reads(path: str, read: dict[str, Recorder]) -> None:
    assert _keys_of(path) == read[path].asked


@pytest.mark.parametrize(("path", "model"), MODELS.items(), ids=list(MODELS))
def test_keys_of_a_block_are_the_fields_of_its_model(path: str, model: type[DeepSpeedConfigModel]) -> None:
    removed = set(ds_config._REMOVED_ZERO_CONFIG_KEYS) if path == "zero_optimization" else set()
    assert _keys_of(path) == _fields(model) | removed


def test_pipeline_keys_are_deepspeeds_defaults_and_use_reentrant() -> None:
    # the engine alone reads use_reentrant, without a default in the configuration
    assert _keys_of("pipeline") == {*ds_config.get_pipeline_config({}), "use_reentrant"}


def test_features_that_deepspeed_removed_are_refused() -> None:
    for key in ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS:
        assert ds_keys.TOP_LEVEL_KEYS[key].refused
    for key in ds_config._REMOVED_ZERO_CONFIG_KEYS:
        assert ds_keys.ZERO_KEYS[key].refused


@pytest.mark.parametrize(("path", "model"), MODELS.items(), ids=list(MODELS))
def test_deepspeeds_own_defaults_keep_our_rules(path: str, model: type[DeepSpeedConfigModel]) -> None:
    rules = ds_keys.TOP_LEVEL_KEYS
    for part in path.split("."):
        rules = rules[part].keys
    for key, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if not rules[key].refused:
            # DeepSpeed's counts are a subclass of int, its stage an enumeration
            plain = int(default) if isinstance(default, int) and not isinstance(default, bool) else default
            assert rules[key].allows(plain), key


def test_default_clipping_is_deepspeeds() -> None:
    from dsaux import config_deepspeed

    assert ds_config.get_gradient_clipping({}) == config_deepspeed._DEFAULT_CLIPPING


VALUES: tuple[Any, ...] = (
    *(False, True, None, {}, {"enabled": False}, {"enabled": True}, [], ["a"], "", "auto"),
    *(0, 1, -1, 2, 0.5, 1.0, 2.0, 5e8, 2**62, 1e300, -1e300, 1e-300),
)
PATHS = [path for path, rule in _paths(ds_keys.TOP_LEVEL_KEYS) if path[0] not in ("optimizer", "scheduler")]
"""Of both blocks the parameters have tables of their own."""


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(path))
def test_every_value_that_is_let_through_can_be_read_by_deepspeed(path: tuple[str, ...]) -> None:
    rule = dict(_paths(ds_keys.TOP_LEVEL_KEYS))[path]
    for value in (*VALUES, *rule.choices, *rule.also, *rule.unless):
        document: dict[str, Any] = {"optimizer": {"type": "Adam", "params": {}}, "zero_optimization": {"stage": 1}}
        if "batch" not in path[0] and path[0] != "gradient_accumulation_steps":
            document["train_batch_size"] = 16
        block = document
        for key in path[:-1]:
            block = block.setdefault(key, {})
        block[path[-1]] = value
        try:
            check_deepspeed(document, stages="auto", partition="best")
        except ConfigError:
            continue
        DeepSpeedConfig(copy.deepcopy(document))


# ---- optimizers and schedules ------------------------------------------------------------------------------


def _parameters(owner: Any) -> set[str]:
    return set(inspect.signature(owner.__init__).parameters) - {"self", "params", "optimizer"}


def test_optimizers_are_those_of_torch_and_deepspeed() -> None:
    ours = {
        *ds_optim_keys.TORCH_OPTIMIZERS,
        *ds_optim_keys.DEEPSPEED_OPTIMIZERS,
        *ds_optim_keys.REFUSED_OPTIMIZERS,
    }
    of_torch = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert of_torch <= ours
    assert set(ds_config.DEEPSPEED_OPTIMIZERS) <= {name.lower() for name in ours}
    lower_case = {name.lower() for name in ds_optim_keys.DEEPSPEED_OPTIMIZERS}
    assert lower_case <= set(ds_config.DEEPSPEED_OPTIMIZERS)


@pytest.mark.parametrize("name", ds_optim_keys.TORCH_OPTIMIZERS)
def test_parameters_of_a_torch_optimizer_exist(name: str) -> None:
    known = {*ds_optim_keys.TORCH_OPTIMIZERS[name], *ds_optim_keys.TORCH_PARAMS_OF_ALL}
    assert known <= _parameters(getattr(torch.optim, name))


@pytest.mark.parametrize("name", ds_optim_keys.TORCH_OPTIMIZERS)
def test_every_parameter_of_a_torch_optimizer_has_a_rule(name: str) -> None:
    assert _parameters(getattr(torch.optim, name)) <= set(ds_optim_keys.OPTIMIZER_PARAM_RULES)


@pytest.mark.parametrize(
    ("name", "fused"), [("Adam", FusedAdam), ("AdamW", FusedAdam), ("Lamb", FusedLamb), ("Lion", FusedLion)]
)
def test_parameters_of_a_deepspeed_optimizer_are_its_signature(name: str, fused: type) -> None:
    switches = set(ds_optim_keys.OPTIMIZER_SWITCHES) if "Adam" in name else set()
    refused = {"max_grad_norm"} if name == "Lamb" else set()  # DeepSpeed refuses it for all optimizers
    assert set(ds_optim_keys.DEEPSPEED_OPTIMIZERS[name]) == (_parameters(fused) | switches) - refused


def test_muon_is_refused_because_it_cannot_step_the_weight_of_a_convolution() -> None:
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    weight = torch.ones(4, 4, 3, 3)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="must match"):
        muon_update(weight, torch.zeros_like(weight))
    assert "Muon" in ds_optim_keys.REFUSED_OPTIMIZERS


def test_optimizers_tested_with_zero_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    names = set()
    for optimizer in ZERO_SUPPORTED_OPTIMIZERS:
        names.add(optimizer.__name__.removeprefix("Fused").removeprefix("DeepSpeedCPU").removeprefix("ZenFlowCPU"))
    # DeepSpeed adds Muon, which is refused, when it is first asked for one of them
    assert set(ds_optim_keys.ZERO_TESTED_OPTIMIZERS) == names - {"MuonWithAuxAdam"}


def test_schedules_are_deepspeeds() -> None:
    assert set(ds_optim_keys.SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)


@pytest.mark.parametrize("name", ds_optim_keys.SCHEDULERS)
def test_parameters_of_a_schedule_are_its_signature(name: str) -> None:
    owner = getattr(lr_schedules, name)
    assert set(ds_optim_keys.SCHEDULERS[name]) == _parameters(owner)
    without_default = [
        parameter.name
        for parameter in inspect.signature(owner.__init__).parameters.values()
        if parameter.default is parameter.empty and parameter.name not in ("self", "optimizer")
    ]
    assert set(without_default) <= set(ds_optim_keys.SCHEDULER_REQUIRED.get(name, {}))


def test_every_rule_describes_itself() -> None:
    for rule in _all_rules(ds_keys.TOP_LEVEL_KEYS.values()):
        assert rule.describe()


def _all_rules(rules: Iterable[Rule]) -> Iterable[Rule]:
    for rule in rules:
        yield rule
        yield from _all_rules(rule.keys.values())
