"""The whole configuration of a run: one DeepSpeed JSON document with a "dsaux" block, as frozen dataclasses.

First on a run's path: `train.py`, the benchmarks and the tools call `load_config`, then `check_launch` once
the number of processes is known, then hand `resolved_deepspeed` to `deepspeed.initialize`. `load_config`
refuses what is wrong in the document itself, `check_launch` what does not fit the model, the data set or the
processes; both come before any process group. Each key is described once, in the metadata of its field: the
checks and the README's table come from there (`python -m dsaux.config --markdown`).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dsaux.config_deepspeed import check_deepspeed, check_optimizer, torch_optimizer_of
from dsaux.config_rules import ConfigError, Rule, check_names, check_value, join, plain_copy, show
from dsaux.ds_keys import TOP_LEVEL_KEYS
from dsaux.launch_check import Launch, check_launch, check_partition_form, resolved_deepspeed
from dsaux.models.reference import is_reference

__all__ = [
    "AuxConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DsauxConfig",
    "Launch",
    "ModelConfig",
    "PipelineConfig",
    "RunConfig",
    "aux_optimizer",
    "check_launch",
    "config_from_dict",
    "default_value",
    "load_config",
    "markdown_table",
    "resolved_deepspeed",
]

_T = TypeVar("_T")
_LONGEST_NAME = 200  # bytes; file systems stop at 255, and a number may follow the name


def _key(default: Any, rule: Rule, text: str) -> Any:
    """A dataclass field with its default, its rule and its help."""
    return field(default=default, metadata={"rule": rule, "help": text})


def _flag(default: bool, text: str) -> Any:
    return _key(default, Rule("flag"), text)


def _int(default: int | None, low: int, text: str, *, high: int | None = None) -> Any:
    return _key(default, Rule("int", low=low, high=high, null=default is None), text)


def _choice(default: str, choices: tuple[str, ...], text: str) -> Any:
    return _key(default, Rule("text", choices=choices), text)


def _number(default: float | None, text: str, *, positive: bool) -> Any:
    return _key(default, Rule("number", low=0, open_low=positive, null=default is None), text)


@dataclass(frozen=True)
class ModelConfig:
    """Block "dsaux.model": the network that is trained."""

    name: str = _key(
        "resnet20",
        Rule("text"),
        "The network: a ResNet for CIFAR (resnet20, resnet110 ...), a WideResNet (wrn28_10 ...), one of torchvision's"
        " (resnet18, resnet50 ...), all listed above; or one of your own, path/to/file.py:function or"
        " package.module:function.",
    )
    zero_init: bool = _flag(
        False, "Start the last BatchNorm of each residual branch with weight 0 (not for wrn, which has none there)."
    )
    dropout: float = _key(
        0.0,
        Rule("number", low=0, high=1, open_high=True),
        "wrn only: share of the activations between a block's convolutions that are set to 0 in training; every rank"
        " draws its own.",
    )
    args: Mapping[str, Any] | None = _key(
        None, Rule("block", null=True), "Arguments of the function that makes a network of your own, by name."
    )


@dataclass(frozen=True)
class DataConfig:
    """Block "dsaux.data": the images and who loads them."""

    name: str = _choice(
        "photos",
        ("photos", "synthetic", "cifar10", "cifar100", "imagenet", "folder", "text"),
        "Data set; see Data sets above.",
    )
    root: str | None = _key(
        None,
        Rule("text", null=True),
        "Folder of the data; null is `data` for cifar10 and cifar100, `data/imagenet` for imagenet.",
    )
    download: bool = _flag(True, "Fetch cifar10 or cifar100 into root where their files are missing.")
    verify: bool = _flag(
        True, "Take the official files of cifar10 and cifar100 alone; false for own ones in the same format."
    )
    loader: str = _choice("dali", ("dali", "torch"), "Who augments and batches: NVIDIA DALI or PyTorch's DataLoader.")
    workers: int = _int(
        0,
        0,
        "Worker processes of the torch loader, for the test set as well where images are files; 0 loads in the training"
        " process.",
    )
    decode: str = _choice(
        "every_rank",
        ("every_rank", "once_per_node"),
        "Who makes a batch: every rank for itself, or one rank of a replica on each host for the others there, through"
        " shared memory.",
    )
    augment: bool = _flag(
        True,
        "Random crops (reflect padding of 4; imagenet and folder: random-resized crops) and horizontal flips of"
        " training images; random starts of text.",
    )
    cutout: int = _int(
        0, 0, "Side in pixels of the square, somewhere in a training image, that is greyed out (Cutout); 0 for none."
    )
    rand_augment: int = _int(
        0,
        0,
        "Strength of two random changes of each training image in colour or place (as in RandAugment); 0 for none.",
        high=10,
    )
    color: float = _key(
        0.0,
        Rule("number", low=0, high=10),
        "imagenet, folder: colour jitter s; brightness, contrast and saturation are multiplied by 1 - s .. 1 + s.",
    )
    train_samples: int | None = _int(
        None, 1, "Training images, or blocks of text; null makes 6,000, or takes all that there are."
    )
    test_samples: int | None = _int(
        None, 1, "Test images, or blocks of text; null makes 1,800, or takes all that there are."
    )
    image_size: int | None = _int(None, 8, "Side of the images in pixels; null is 32, for imagenet and folder 224.")
    context: int = _int(64, 2, "text: characters in a sample.")
    guard_every: int = _int(
        100, 0, "Steps between checks that all stages see the same batch; 0 checks the first step only."
    )


@dataclass(frozen=True)
class PipelineConfig:
    """Block "dsaux.pipeline": how the network is cut and driven."""

    stages: int = field(metadata={"rule": Rule("int", low=1), "help": "Stages K; must divide the number of processes."})
    partition: str | tuple[int | str, ...] = _key(
        "time",
        Rule("any", text='"uniform", "parameters", "time" or a list of layers'),
        "Where to cut: equal layer counts, equal parameters, equal measured times, or the layer (index or"
        " name) that starts"
        " each stage after the first.",
    )
    schedule: str = _choice(
        "penalty",
        ("penalty", "al", "local", "1f1b"),
        "Decoupled training by the penalty or the augmented Lagrangian method, by greedy local losses behind small"
        " heads (a peer to compare with), or DeepSpeed's own exact back-propagation.",
    )
    placement: str = _choice(
        "stages_near",
        ("stages_near", "replicas_near"),
        "What lies on neighbouring ranks, that is on one host: the stages of a replica, or the replicas of a stage.",
    )


@dataclass(frozen=True)
class AuxConfig:
    """Block "dsaux.aux": the auxiliary network and the coefficients of the local losses."""

    beta: float = _number(
        10.0, "Coupling of the stages: weight of a stage's match to the next stage's input.", positive=True
    )
    rho: float = _number(1.0, "Coupling of the AuxNet: weight of its match to what the stages make.", positive=False)
    gamma: float = _number(1.0, "Weight of the task gradient in the AuxNet.", positive=False)
    depth: int = _int(1, 1, "Residual blocks in each segment of the AuxNet.")
    width: float = _number(1.0, "Channels inside a segment, as a multiple of its boundary's channels.", positive=True)
    segment: str = _key(
        "light",
        Rule("text", choices=("light", "full", "bottleneck"), or_function=True),
        "Segments work at half the boundary's resolution, at all of it, or at half with a quarter of the channels (for"
        " boundaries of many); for tokens, with a quarter of the boundary's width inside, or all of it (full). Or"
        " segments of your own, file.py:function.",
    )
    scaled: bool = _flag(True, "Divide the coupling by the running variance of each boundary.")
    transport: str = _choice(
        "full",
        ("full", "bf16"),
        "al: precision of the refreshed variables on their way to the stage before; local: of a stage's outputs on"
        " their way to the next.",
    )
    overlap: bool = _flag(
        False, "al: let the sum of the AuxNet's gradients run under the next tick; the AuxNet steps one tick late."
    )
    optimizer: Mapping[str, Any] | None = _key(
        None,
        Rule("block", keys={"type": Rule("text"), "params": Rule("block")}, null=True),
        'Optimizer of the AuxNet, {"type": a torch.optim name, "params": {...}}; null takes the one in'
        " DeepSpeed's block. Its lr is the top of a curve in proportion to the stages'.",
    )


@dataclass(frozen=True)
class RunConfig:
    """Block "dsaux.run": length, seed and reports of the run."""

    name: str = _key("run", Rule("text"), "Name of the run and of its folder of results; no path separators.")
    epochs: int = _int(10, 1, "Passes over the training images.")
    max_steps: int | None = _int(None, 1, "Stop after this many steps, if that comes first; null trains all epochs.")
    exact_epochs: int = _int(0, 0, "Of the epochs, how many at the end use exact back-propagation.")
    exact_lr: float | None = _number(
        None, "Learning rate of the exact epochs; null keeps the schedule's.", positive=True
    )
    seed: int = _int(0, 0, "Seed of weights, order of the images and augmentation.", high=2**32 - 1)
    label_smoothing: float = _key(
        0.0,
        Rule("number", low=0, high=1, open_high=True),
        "Share of the label's weight that goes to all classes alike, in the training loss only.",
    )
    eval_every: int = _int(1, 0, "Epochs between evaluations; 0 evaluates at the end only.")
    log_every: int = _int(20, 1, "Steps between lines of the log.")
    bn_batches: int = _int(16, 1, "Batches that re-estimate BatchNorm's statistics before an evaluation.")
    eval_batch_size: int = _int(256, 1, "Images per replica in a batch of the evaluation.")
    checkpoint_every: int | None = _int(
        None, 0, "Steps between checkpoints; null saves once an epoch, 0 at the end only. The end is saved always."
    )
    keep: int = _int(2, 1, "Newest checkpoints to keep.")
    channels_last: bool = _flag(
        False,
        "Keep 4-dimensional weights and activations with the channels last in memory, which convolutions on a GPU are"
        " faster with, in bf16 above all.",
    )
    compile: bool = _flag(
        False,
        "Training passes of stages and AuxNet through `torch.compile`; where that is not possible they run as they are,"
        " and the log says why.",
    )
    profile_steps: int = _int(
        0,
        0,
        "Steps behind a warm-up of 10 that every rank times, and as many that it traces, into the run folder's"
        " `profile/`; `python -m dsaux.profile` shows them. 0 for none.",
    )
    nan: str = _choice(
        "stop",
        ("stop", "skip"),
        "On a loss or gradient that is no finite number: stop the run, or leave the batch out on all ranks.",
    )
    cuda_graphs: bool = _flag(
        False,
        "Replay all but the communication of a tick as CUDA graphs, on GPUs: a small network is bound by Python"
        " and launches.",
    )
    aux_stream: bool = _flag(
        False,
        "On a GPU: the AuxNet's segment that makes a stage's target runs beside the stage, on a stream of its own. Pays"
        " with cuda_graphs and small networks.",
    )
    timeout_s: int = _int(
        600,
        1,
        "Seconds that a collective may take; nine tenths of it without progress on any rank end the run as well.",
    )


@dataclass(frozen=True)
class DsauxConfig:
    """The "dsaux" block."""

    model: ModelConfig
    data: DataConfig
    pipeline: PipelineConfig
    aux: AuxConfig
    run: RunConfig


@dataclass(frozen=True)
class Config:
    """A checked configuration.

    Attributes:
        dsaux: the "dsaux" block with all defaults filled in.
        deepspeed: the top level without "dsaux", as given. Not to be changed: `resolved_deepspeed` copies it.
    """

    dsaux: DsauxConfig
    deepspeed: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the effective JSON document; `config_from_dict` makes an equal Config of it."""
        return {**copy.deepcopy(self.deepspeed), "dsaux": _to_plain(self.dsaux)}

    def settings_without_effect(self) -> list[str]:
        """Returns a sentence for each dsaux key that was changed but that this run does not use, or not fully."""
        return [*self._aux_without_effect(), *self._run_without_effect()]

    def _run_without_effect(self) -> list[str]:
        return [
            *self._compile_without_effect(),
            *self._channels_last_without_effect(),
            *self._aux_stream_without_effect(),
        ]

    def _compile_without_effect(self) -> list[str]:
        every = (self.deepspeed.get("pipeline") or {}).get("activation_checkpoint_interval")
        if not (self.dsaux.run.compile and every):
            return []
        return [
            f"dsaux.run.compile is true, which has no effect on the stages with pipeline.activation_checkpoint_interval"
            f" {show(every)}: DeepSpeed's checkpoints stand between the layers. Only the AuxNet is compiled."
        ]

    def _aux_stream_without_effect(self) -> list[str]:
        schedule, stages = self.dsaux.pipeline.schedule, self.dsaux.pipeline.stages
        if not self.dsaux.run.aux_stream or has_aux_net(self.dsaux) or schedule == "1f1b":  # a twin, as below
            return []
        return [
            f"dsaux.run.aux_stream is true, which has no effect with schedule {schedule} and {stages}"
            f" stage{'s' * (stages != 1)}: there is no AuxNet. Leave the key out."
        ]

    def _channels_last_without_effect(self) -> list[str]:
        if not self.dsaux.run.channels_last:
            return []
        if self.dsaux.data.name == "text":
            return [
                "dsaux.run.channels_last is true, which has no effect on text: it is about images (4 dimensions). Leave"
                " the key out."
            ]
        if self.has_flat_weights():
            return [
                "dsaux.run.channels_last is true, which with bf16 or ZeRO turns the stages' activations but not their"
                " weights: DeepSpeed keeps those in one flat tensor, and each convolution turns its own anew."
            ]
        return []

    def has_flat_weights(self) -> bool:
        """Whether DeepSpeed keeps a stage's weights in one flat tensor, as with bf16 or ZeRO."""
        blocks = {key: self.deepspeed.get(key) or {} for key in ("bf16", "zero_optimization")}
        return bool(blocks["bf16"].get("enabled") or blocks["zero_optimization"].get("stage"))

    def _aux_without_effect(self) -> list[str]:
        schedule, aux = self.dsaux.pipeline.schedule, self.dsaux.aux
        if schedule == "local":
            return [
                f"dsaux.aux.{key} is {show(_to_plain(getattr(aux, key)))}, which has no effect with schedule local: it"
                " has no AuxNet, and its heads belong to the stages. Leave the key out."
                for key in (key.name for key in fields(AuxConfig) if key.name != "transport")
                if getattr(aux, key) != getattr(AuxConfig(), key)
            ]
        if schedule in ("al", "1f1b"):  # a twin under 1f1b has the whole block of the run that it is compared with
            return []
        changed = {"overlap": aux.overlap, "transport": aux.transport != "full"}
        return [
            f"dsaux.aux.{key} is {show(getattr(aux, key))}, which has no effect with schedule {schedule}: it sends no"
            " refreshed variables. Set dsaux.pipeline.schedule to al, or leave the key out."
            for key, is_changed in changed.items()
            if is_changed
        ]

    def without_auxnet(self) -> Config:
        """Returns the configuration for the network alone, as evaluation uses it: schedule 1f1b, no AuxNet."""
        pipeline = replace(self.dsaux.pipeline, schedule="1f1b")
        run = replace(self.dsaux.run, exact_epochs=0, exact_lr=None)
        return replace(self, dsaux=replace(self.dsaux, pipeline=pipeline, run=run))


WITHOUT_AUX_NET = ("local", "1f1b")
"""Schedules that train none."""


def has_aux_net(dsaux: DsauxConfig) -> bool:
    """Whether a run trains an AuxNet."""
    return dsaux.pipeline.schedule not in WITHOUT_AUX_NET and dsaux.pipeline.stages > 1


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a JSON file.

    Args:
        path: file with one DeepSpeed JSON document that has a "dsaux" block.
        overrides: "a.b.c=VALUE" each; VALUE is JSON, else taken as a string.

    Raises:
        ConfigError: if the file cannot be read, is not JSON, or breaks a rule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}. Give the path of a JSON file.") from error
    try:
        raw = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path} is not JSON: {error.msg} at {place}. Mend that place.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of braces
        raise ConfigError(f"{path} cannot be read as JSON: {error}. Write it plainly.") from error
    return config_from_dict(raw, overrides=overrides, source=str(path))


def config_from_dict(raw: Mapping[str, Any], *, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Checks a document that is already in memory.

    Args:
        raw: DeepSpeed's document with a "dsaux" block; copied, never changed.
        overrides: as in `load_config`.
        source: name of the document for the errors.

    Raises:
        ConfigError: for the first key that is unknown, has a wrong value, or contradicts another one.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source} holds {show(raw)}; it must be a JSON object {{...}}. Put the keys in braces.")
    document = plain_copy(raw, "")
    for override in overrides:
        _apply_override(document, override)
    if "dsaux" not in document:
        raise ConfigError(
            f'{source} has no "dsaux" block. Add "dsaux": {{"pipeline": {{"stages": 3}}}} with your number of stages.'
        )
    block = document.pop("dsaux")
    _hint_misplaced(document)
    dsaux: DsauxConfig = _build(DsauxConfig, block, "dsaux")
    check_deepspeed(document, stages=dsaux.pipeline.stages, partition=_to_plain(dsaux.pipeline.partition))
    config = Config(dsaux=dsaux, deepspeed=document)
    _check_together(config)
    return config


def aux_optimizer(config: Config) -> tuple[str, dict[str, Any]]:
    """Returns the AuxNet's optimizer: its name in torch.optim and its parameters.

    Raises:
        ConfigError: if dsaux.aux.optimizer is null and torch.optim has no twin of DeepSpeed's optimizer.
    """
    own = config.dsaux.aux.optimizer
    if own is not None:
        return str(own["type"]), copy.deepcopy(own.get("params", {}))
    return torch_optimizer_of(copy.deepcopy(config.deepspeed["optimizer"]), path="optimizer")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    block: dict[str, Any] = {}
    for key, value in pairs:
        if key in block:
            raise ConfigError(
                f'key "{key}" stands twice in one block ({show(block[key])} and {show(value)}). Keep one.'
            )
        block[key] = value
    return block


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {show(override)} is not of the form a.b.c=VALUE. Write it like dsaux.aux.beta=30.")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError:
        value = text
    except ConfigError as error:
        raise ConfigError(f"override {show(override)}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"override {show(override)} cannot be read: {error}. Write it plainly.") from error
    block: Any = document
    for depth, key in enumerate(keys[:-1]):
        if block.get(key) is None:
            block[key] = {}
        block = block[key]
        if not isinstance(block, dict):
            here = ".".join(keys[: depth + 1])
            raise ConfigError(
                f"override {show(override)} goes through {here}, which is {show(block)} and has no keys. Set"
                f" {here} itself."
            )
    block[keys[-1]] = plain_copy(value, path.strip())


def _hint_misplaced(document: Mapping[str, Any]) -> None:
    """Names the right place of a dsaux key that stands at the top level."""
    homes = {path.rsplit(".", 1)[-1]: path for path, _ in _all_keys() if path.count(".") > 1}
    homes |= {block.name: f"dsaux.{block.name}" for block in fields(DsauxConfig)}
    for key in document:
        if key in homes and key not in TOP_LEVEL_KEYS:
            raise ConfigError(f"{key} is not a known key of the top level. Did you mean {homes[key]}?")


def _build(cls: type[_T], block: Any, path: str) -> _T:
    """Makes a frozen dataclass of a JSON object, its rules checked and its defaults filled in."""
    check_value(path, block, Rule("block"), default="the defaults")
    members: tuple[Field[Any], ...] = fields(cls)  # type: ignore[arg-type]
    check_names(path, block, [member.name for member in members])
    values: dict[str, Any] = {}
    for member in members:
        where = join(path, member.name)
        if "rule" not in member.metadata:
            values[member.name] = _build(_BLOCKS[member.name], block.get(member.name, {}), where)
        elif member.name in block:
            default = "" if member.default is MISSING else f"the default {show(member.default)}"
            values[member.name] = _typed(where, block[member.name], member.metadata["rule"], default=default)
        elif member.default is MISSING:
            raise ConfigError(
                f"{where} is missing; it has no default and must be {member.metadata['rule'].describe()}. Set it."
            )
    return cls(**values)


def _typed(path: str, value: Any, rule: Rule, *, default: str) -> Any:
    check_value(path, value, rule, default=default)
    if rule.kind == "number" and value is not None:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


_BLOCKS: Mapping[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "pipeline": PipelineConfig,
    "aux": AuxConfig,
    "run": RunConfig,
}


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return {member.name: _to_plain(getattr(value, member.name)) for member in fields(value)}
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


def _check_together(config: Config) -> None:
    """Checks that look at more than one key."""
    _check_run(config.dsaux)
    model = config.dsaux.model
    if model.args is not None and not is_reference(model.name):
        raise ConfigError(
            f"dsaux.model.args is {show(model.args)} but dsaux.model.name is {show(model.name)}, which takes none; they"
            " are for a network of your own (path/to/file.py:function). Remove dsaux.model.args."
        )
    check_partition_form(config.dsaux.pipeline.partition)
    if config.dsaux.aux.optimizer is not None:
        check_optimizer("dsaux.aux.optimizer", config.dsaux.aux.optimizer, torch_only=True)
    if has_aux_net(config.dsaux):
        aux_optimizer(config)


def _check_run(dsaux: DsauxConfig) -> None:
    run = dsaux.run
    if not run.name.strip() or run.name in (".", "..") or any(mark in run.name for mark in "/\\\0"):
        raise ConfigError(
            f"dsaux.run.name is {show(run.name)}; it names a folder and must be neither empty nor hold / or"
            " \\."
            ' Change it to a plain name such as "run".'
        )
    if len(run.name.encode()) > _LONGEST_NAME:
        raise ConfigError(
            f"dsaux.run.name has {len(run.name.encode())} bytes; a folder's name may have {_LONGEST_NAME}. Shorten it."
        )
    if run.exact_epochs > 0 and dsaux.pipeline.schedule == "1f1b":
        raise ConfigError(
            f'dsaux.run.exact_epochs is {run.exact_epochs} but dsaux.pipeline.schedule is "1f1b", which is'
            " exact"
            " in every epoch. Set exact_epochs to 0, or the schedule to penalty."
        )
    if run.exact_epochs >= run.epochs:
        raise ConfigError(
            f"dsaux.run.exact_epochs is {run.exact_epochs} but dsaux.run.epochs is {run.epochs}; the exact"
            " epochs are"
            f" the last of a run that starts decoupled. Set exact_epochs below {run.epochs}, or the schedule"
            ' to "1f1b".'
        )
    if run.nan == "skip" and dsaux.aux.overlap:
        raise ConfigError(
            'dsaux.run.nan is "skip" but dsaux.aux.overlap is true: a stage would know of the others\' faults a step'
            ' too late. Set overlap to false, or nan to "stop".'
        )
    if run.exact_lr is not None and run.exact_epochs == 0:
        raise ConfigError(
            f"dsaux.run.exact_lr is {run.exact_lr:g} but dsaux.run.exact_epochs is 0, so it has no effect."
            " Set exact_epochs, or remove exact_lr."
        )


def _all_keys() -> Iterator[tuple[str, Field[Any]]]:
    for block in fields(DsauxConfig):
        for member in fields(_BLOCKS[block.name]):
            yield f"dsaux.{block.name}.{member.name}", member


def default_value(path: str) -> Any:
    """The default of a key such as "dsaux.aux.beta"; None for one that has none, or that is no key of dsaux."""
    found = next((member.default for name, member in _all_keys() if name == path), MISSING)
    return None if found is MISSING else found


def markdown_table() -> str:
    """Returns the table of all dsaux keys for the README: key, type, default, what it does."""
    lines = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for path, member in _all_keys():
        default = "required" if member.default is MISSING else f"`{json.dumps(member.default)}`"
        kind = member.metadata["rule"].describe().replace("|", "\\|")
        lines.append(f"| `{path}` | {kind} | {default} | {member.metadata['help']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the README's table of keys."""
    parser = argparse.ArgumentParser(prog="python -m dsaux.config", description="Documentation of the dsaux block.")
    parser.add_argument(
        "--markdown", action="store_true", required=True, help="print the table of all keys as Markdown"
    )
    parser.parse_args(arguments)
    print(markdown_table())


if __name__ == "__main__":
    main()
