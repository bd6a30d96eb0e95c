"""Wrong configurations, command lines and environments, each with a fragment of the error it must end with.

`tests/unit/test_config.py` holds those that are wrong in the document alone against the checks;
`tests/launch/test_bad_input.py` starts the real train.py with every one of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REMOVE = object()
"""As a value in `BadInput.sets`: take the key away."""

_GOOD: dict[str, Any] = {
    "train_batch_size": 32,
    "gradient_clipping": 5.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 2, "warmup_type": "linear"},
    },
    "dsaux": {
        "model": {"name": "resnet8"},
        "data": {"name": "synthetic", "loader": "torch", "train_samples": 128, "test_samples": 64},
        "pipeline": {"stages": 2, "partition": "uniform", "schedule": "penalty"},
        "run": {"name": "small", "epochs": 2},
    },
}


def good_config(sets: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A small configuration that trains, with changes such as {"dsaux.aux.beta": 3}; REMOVE takes a key"
    " away."""
    document = copy.deepcopy(_GOOD)
    for path, value in (sets or {}).items():
        *parents, last = path.split(".")
        block = document
        for key in parents:
            block = block.setdefault(key, {})
        if value is REMOVE:
            del block[last]
        else:
            block[last] = value
    return document


@dataclass(frozen=True)
class BadInput:
    """One mistake.

    Attributes:
        name: id of the test.
        says: fragment of the error.
        sets: changes of the good configuration.
        text: what the file holds instead of a configuration.
        config: path given as --ds_config; "{folder}" is the folder of the test. None leaves the option out.
        arguments: further arguments of train.py.
        environment: changes of the environment; None removes a variable.
        prepare: makes files in the folder of the test.
        on_rank_0_alone: only rank 0 can see it (it alone writes the run folder); a launcher ends the others.
    """

    name: str
    says: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    config: str | None = "{folder}/config.json"
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    on_rank_0_alone: bool = False

    @property
    def is_in_the_document(self) -> bool:
        """Whether the mistake is in the configuration alone, so that it can be checked without a process."""
        elsewhere = self.arguments, self.environment, self.prepare
        return self.text is None and not any(elsewhere) and self.config == "{folder}/config.json"

    def file_text(self) -> str:
        """Content of the configuration file."""
        return json.dumps(good_config(self.sets), indent=1) if self.text is None else self.text


def _set(name: str, path: str, value: Any, says: str, **more: Any) -> BadInput:
    return BadInput(name, says, sets={path: value, **more})


def _hide_dali(folder: Path) -> None:
    (folder / "hidden" / "nvidia").mkdir(parents=True)
    (folder / "hidden" / "nvidia" / "__init__.py").touch()  # a whole package, in which there is no dali


def _make_earlier_run(folder: Path) -> None:
    (folder / "earlier").mkdir()
    (folder / "earlier" / "config.json").write_text("{}\n")
    (folder / "earlier" / "metrics.jsonl").touch()


_MISSPELT = [
    _set("misspelt top level", "gradient_cliping", 1.0, "Did you mean gradient_clipping?"),
    _set("misspelt batch size", "train_batchsize", 32, "Did you mean train_batch_size?"),
    _set("misspelt dsaux", "dsauxx", {}, "dsauxx is not a known key of the top level"),
    _set("misspelt block of dsaux", "dsaux.pipline", {}, "Did you mean pipeline?"),
    _set("misspelt key of dsaux.model", "dsaux.model.nam", "resnet8", "Did you mean name?"),
    _set("misspelt key of dsaux.data", "dsaux.data.image_sise", 32, "Did you mean image_size?"),
    _set("misspelt key of dsaux.pipeline", "dsaux.pipeline.partitoin", "time", "Did you mean partition?"),
    _set("misspelt key of dsaux.aux", "dsaux.aux.bta", 3, "Did you mean beta?"),
    _set("misspelt key of dsaux.run", "dsaux.run.epoch", 3, "Did you mean epochs?"),
    _set("misspelt key of optimizer", "optimizer.parms", {}, "Did you mean params?"),
    _set("misspelt parameter of optimizer", "optimizer.params.momentun", 0.9, "Did you mean momentum?"),
    _set("parameter of another optimizer", "optimizer.params.betas", [0.9, 0.9], "optimizer.params.betas"),
    _set("misspelt parameter of scheduler", "scheduler.params.warmup_steps", 3, "Did you mean warmup_"),
    _set("misspelt key of zero_optimization", "zero_optimization.stge", 1, "Did you mean stage?"),
    _set("misspelt key of bf16", "bf16.enable", True, "Did you mean enabled?"),
    _set(
        "misspelt key of activation_checkpointing",
        "activation_checkpointing.number_of_checkpoints",
        2,
        "Did you mean number_checkpoints?",
    ),
    _set("misspelt key of pipeline", "pipeline.activation_checkpoint_intervall", 1, "Did you mean activation_"),
    _set("misspelt key of tensorboard", "tensorboard.output_dir", "x", "Did you mean output_path?"),
    _set("misspelt key of csv_monitor", "csv_monitor.jobname", "x", "Did you mean job_name?"),
    _set("misspelt key of wandb", "wandb.projct", "x", "Did you mean project?"),
    _set("misspelt key in a block in a block", "timers.throughput.enable", True, "Did you mean enabled?"),
    _set(
        "misspelt key of the AuxNet's optimizer",
        "dsaux.aux.optimizer",
        {"type": "SGD", "param": {}},
        "Did you mean params?",
    ),
    _set("dsaux key at the top level", "beta", 3, "Did you mean dsaux.aux.beta?"),
]

_WRONG_VALUES = [
    _set("text for a number", "dsaux.aux.beta", "ten", 'dsaux.aux.beta is "ten"; it must be a number > 0'),
    _set("fraction for a whole number", "dsaux.run.epochs", 2.5, "dsaux.run.epochs is 2.5"),
    _set("true for a whole number", "dsaux.pipeline.stages", True, "dsaux.pipeline.stages is true"),
    _set("text for a flag", "wall_clock_breakdown", "yes", "it must be true or false"),
    _set("list for a block", "dsaux.aux", [1], "dsaux.aux is [1]; it must be a JSON object"),
    _set("number for a block", "zero_optimization", 1, "zero_optimization is 1; it must be a JSON object"),
    _set("null for a number", "dsaux.aux.rho", None, "dsaux.aux.rho is null"),
    _set("NaN learning rate", "optimizer.params.lr", float("nan"), "optimizer.params.lr is nan"),
    _set("infinite learning rate", "optimizer.params.lr", float("inf"), "optimizer.params.lr is inf"),
    _set("negative learning rate", "optimizer.params.lr", -0.1, "optimizer.params.lr is -0.1"),
    _set("learning rate 0", "optimizer.params.lr", 0, "optimizer.params.lr is 0; it must be a number > 0"),
    _set("learning rate as text", "optimizer.params.lr", "0.1", 'optimizer.params.lr is "0.1"'),
    _set("momentum of 1", "optimizer.params.momentum", 1.0, "optimizer.params.momentum is 1.0"),
    _set(
        "betas of one number",
        "optimizer",
        {"type": "Adam", "params": {"betas": [0.9]}},
        "list of two numbers",
    ),
    _set("negative clipping", "gradient_clipping", -1, "gradient_clipping is -1"),
    _set("beta 0", "dsaux.aux.beta", 0, "dsaux.aux.beta is 0; it must be a number > 0"),
    _set("negative rho", "dsaux.aux.rho", -1, "dsaux.aux.rho is -1"),
    _set("NaN gamma", "dsaux.aux.gamma", float("nan"), "dsaux.aux.gamma is nan"),
    _set("depth 0", "dsaux.aux.depth", 0, "dsaux.aux.depth is 0"),
    _set("unknown kind of segment", "dsaux.aux.segment", "ligth", 'Did you mean "light"?'),
    _set("no stage", "dsaux.pipeline.stages", 0, "dsaux.pipeline.stages is 0"),
    _set("negative seed", "dsaux.run.seed", -1, "dsaux.run.seed is -1"),
    _set("seed of 2**32", "dsaux.run.seed", 2**32, "dsaux.run.seed is 4294967296"),
    _set("dropout of 1", "dsaux.model.dropout", 1, "dsaux.model.dropout is 1; it must be a number >= 0 and < 1"),
    _set("text for zero_init", "dsaux.model.zero_init", "yes", "dsaux.model.zero_init is"),
    _set("label smoothing of 1", "dsaux.run.label_smoothing", 1.0, "dsaux.run.label_smoothing is 1.0"),
    _set("no epoch", "dsaux.run.epochs", 0, "dsaux.run.epochs is 0"),
    _set("no step", "dsaux.run.max_steps", 0, "dsaux.run.max_steps is 0"),
    _set("run name with a slash", "dsaux.run.name", "a/b", "dsaux.run.name"),
    _set("run name of a thousand letters", "dsaux.run.name", "a" * 1000, "dsaux.run.name has 1000 bytes"),
]

_UNKNOWN_NAMES = [
    _set("unknown data set", "dsaux.data.name", "foto", 'Did you mean "photos"?'),
    _set("unknown loader", "dsaux.data.loader", "tensorflow", 'one of "dali", "torch"'),
    _set("model of a depth that is not 6n+2", "dsaux.model.name", "resnet21", "Did you mean resnet20?"),
    _set("misspelt model", "dsaux.model.name", "resnte20", "Did you mean resnet20?"),
    _set("WideResNet with a dash", "dsaux.model.name", "wrn28-10", "Did you mean wrn28_10?"),
    _set("unknown schedule", "dsaux.pipeline.schedule", "1f-1b", 'Did you mean "1f1b"?'),
    _set("unknown partition", "dsaux.pipeline.partition", "params", 'Did you mean "parameters"?'),
    _set("unknown optimizer", "optimizer.type", "Sgdd", "Did you mean SGD?"),
    _set("optimizer in the wrong case", "optimizer.type", "sgd", "Did you mean SGD?"),
    _set("unknown scheduler", "scheduler.type", "WarmupCosine", "Did you mean WarmupCosineLR?"),
    _set(
        "AuxNet optimizer that torch.optim lacks",
        "dsaux.aux.optimizer",
        {"type": "Lamb"},
        "dsaux.aux.optimizer.type",
    ),
    _set("optimizer without a twin for the AuxNet", "optimizer", {"type": "Lamb"}, "Set dsaux.aux.optimizer"),
]

_CONTRADICTIONS = [
    _set("no optimizer", "optimizer", REMOVE, "optimizer is missing"),
    _set("no dsaux block", "dsaux", REMOVE, 'has no "dsaux" block'),
    _set("no stages", "dsaux.pipeline.stages", REMOVE, "dsaux.pipeline.stages is missing"),
    _set("no batch size", "train_batch_size", REMOVE, "train_batch_size and train_micro_batch_size_per_gpu"),
    _set(
        "scheduler without its length",
        "scheduler.params.total_num_steps",
        REMOVE,
        "total_num_steps is missing",
    ),
    _set("warm-up beyond the end", "scheduler.params.total_num_steps", 1, "warmup_num_steps is 2, above"),
    _set("nesterov without momentum", "optimizer.params", {"lr": 0.1, "nesterov": True}, "nesterov is true"),
    _set(
        "clipping inside the optimizer",
        "optimizer.params.max_grad_norm",
        1,
        "set the top-level gradient_clipping",
    ),
    _set("ZeRO-2", "zero_optimization", {"stage": 2}, "zero_optimization.stage is 2"),
    _set("ZeRO-3", "zero_optimization", {"stage": 3}, "zero_optimization.stage is 3"),
    _set(
        "ZeRO-1 with an untested optimizer",
        "zero_optimization",
        {"stage": 1},
        "zero_allow_untested_optimizer",
    ),
    _set(
        "offload",
        "zero_optimization",
        {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "offload_optimizer",
    ),
    _set("fp16", "fp16", {"enabled": True}, "Use bf16"),
    _set("two precisions", "fp16", {"enabled": True}, "are both true", bf16={"enabled": True}),
    _set("elastic training", "elasticity", {"enabled": True}, "elasticity is"),
    _set("tensor parallel", "tensor_parallel", {"autotp_size": 2}, "tensor_parallel is"),
    _set("curriculum learning", "curriculum_learning", {"enabled": True}, "curriculum_learning is"),
    _set("gradients added in another precision", "data_types", {"grad_accum_dtype": "bf16"}, "grad_accum_dtype"),
    _set("two numbers of stages", "pipeline", {"stages": 4}, "pipeline.stages is 4"),
    _set(
        "exact epochs of an exact run",
        "dsaux.run.exact_epochs",
        1,
        "exact_epochs",
        **{"dsaux.pipeline.schedule": "1f1b"},
    ),
    _set("more exact epochs than epochs", "dsaux.run.exact_epochs", 5, "dsaux.run.epochs is 2"),
    _set("rate of exact epochs without such", "dsaux.run.exact_lr", 0.1, "it has no effect"),
    _set(
        "end before the exact epochs",
        "dsaux.run.exact_epochs",
        1,
        "begin after step 4",
        **{"dsaux.run.max_steps": 4},
    ),
    _set("monitor that is not installed", "comet", {"enabled": True}, "comet_ml is not installed"),
]

_DOES_NOT_FIT = [
    _set(
        "warm-up longer than the run",
        "scheduler.params.total_num_steps",
        "auto",
        "the schedule has the run's 1 steps",
        **{"dsaux.run.max_steps": 1},
    ),
    _set("dropout for a network without", "dsaux.model.dropout", 0.1, "dsaux.model.dropout is 0.1, which resnet8"),
    _set(
        "zero_init for a network without",
        "dsaux.model.zero_init",
        True,
        "which wrn10_1 cannot use",
        **{"dsaux.model.name": "wrn10_1"},
    ),
    _set("stages that do not divide the processes", "dsaux.pipeline.stages", 4, "but 2 processes were started"),
    _set("more stages than layers", "dsaux.pipeline.stages", 6, "resnet8 has 5 layers"),
    _set("too few cuts", "dsaux.pipeline.partition", [], "it must have 1"),
    _set("too many cuts", "dsaux.pipeline.partition", [1, 2], "has 2 entries"),
    _set("cut at layer 0", "dsaux.pipeline.partition", [0], "must start at a layer in 1 .. 4"),
    _set("cut behind the last layer", "dsaux.pipeline.partition", [5], "must start at a layer in 1 .. 4"),
    _set("cut at an unknown layer", "dsaux.pipeline.partition", ["group2.blok1"], "Did you mean group2.block1?"),
    _set("cut at a fraction", "dsaux.pipeline.partition", [1.5], "a layer's index or name"),
    _set("batch that the steps do not divide", "gradient_accumulation_steps", 3, "not a multiple"),
    _set("batch that the micro-batch does not divide", "train_micro_batch_size_per_gpu", 12, "not a multiple"),
    _set(
        "three batch sizes that contradict",
        "train_micro_batch_size_per_gpu",
        8,
        "8 x 2 x 1 = 16",
        gradient_accumulation_steps=2,
    ),
    _set("batch of 0", "train_batch_size", 0, "train_batch_size is 0"),
    _set("micro-batch of one image", "gradient_accumulation_steps", 32, "BatchNorm needs at least 2"),
    _set("fewer images than a batch", "dsaux.data.train_samples", 31, "dsaux.data.train_samples is 31"),
    _set("fewer images than classes", "dsaux.data.test_samples", 1, "dsaux.data.test_samples is 1"),
    _set("folder for data that has none", "dsaux.data.root", "/nowhere/images", "dsaux.data.root"),
    _set(
        "CIFAR without its files",
        "dsaux.data",
        {"name": "cifar10", "loader": "torch", "root": "/nowhere/images", "download": False},
        "/nowhere/images has no files of cifar10",
    ),
    _set("Cutout without augmentation", "dsaux.data.cutout", 8, "cutout is 8", **{"dsaux.data.augment": False}),
    _set("Cutout larger than the image", "dsaux.data.cutout", 33, "dsaux.data.cutout is 33"),
    _set("RandAugment beyond its scale", "dsaux.data.rand_augment", 11, "dsaux.data.rand_augment is 11"),
    _set(
        "workers for DALI",
        "dsaux.data.workers",
        2,
        "dsaux.data.workers is 2",
        **{"dsaux.data.loader": "dali"},
    ),
]

_FILES = [
    BadInput("no such file", "No such file", config="{folder}/missing.json"),
    BadInput("folder for a file", "Is a directory", config="{folder}"),
    BadInput("not JSON", "is not JSON", text='{"train_batch_size": 32,'),
    BadInput("empty file", "is not JSON", text=""),
    BadInput("comment in JSON", "is not JSON", text="// batch\n{}"),
    BadInput("JSON list", "it must be a JSON object", text="[1, 2]"),
    BadInput("key given twice", "stands twice", text='{"train_batch_size": 32, "train_batch_size": 64}'),
    BadInput(
        "number of a million digits",
        "cannot be read as JSON",
        text='{"train_batch_size": 1' + "0" * 10**6 + "}",
    ),
    BadInput("braces without end", "cannot be read as JSON", text='{"a":' * 10**5),
    BadInput(
        "DALI absent",
        "NVIDIA DALI is not installed",
        sets={"dsaux.data.loader": "dali"},
        environment={"PYTHONPATH": "{folder}/hidden"},
        prepare=_hide_dali,
    ),
]

_COMMAND_LINES = [
    BadInput("no configuration", "--ds_config is missing", config=None),
    BadInput("unknown option", "--epochs is not an option of train.py", arguments=("--epochs", "3")),
    BadInput("shortened option", "Did you mean --eval_only?", arguments=("--eval",)),
    BadInput("option without its value", "--run_dir: expected one argument", arguments=("--run_dir",)),
    BadInput("override without =", "is not of the form", arguments=("--set", "dsaux.aux.beta")),
    BadInput("override without a key", "is not of the form", arguments=("--set", "=3")),
    BadInput("override of a misspelt key", "Did you mean beta?", arguments=("--set", "dsaux.aux.bta=3")),
    BadInput("override through a number", "has no keys", arguments=("--set", "train_batch_size.size=3")),
    BadInput("override with NaN", "optimizer.params.lr is nan", arguments=("--set", "optimizer.params.lr=NaN")),
    BadInput("evaluation without a run", "--eval_only needs --run_dir", arguments=("--eval_only",)),
    BadInput("empty run folder name", "--run_dir is empty", arguments=("--run_dir", "")),
    BadInput(
        "evaluation of a folder without a run",
        "has no config.json",
        arguments=("--eval_only", "--run_dir", "{folder}/empty"),
        prepare=lambda folder: (folder / "empty").mkdir(),
    ),
    BadInput(
        "evaluation of a missing folder",
        "is not a folder",
        arguments=("--eval_only", "--run_dir", "{folder}/missing"),
    ),
    BadInput(
        "run folder that holds a run",
        "holds a run already",
        arguments=("--run_dir", "{folder}/earlier"),
        prepare=_make_earlier_run,
        on_rank_0_alone=True,
    ),
    BadInput(
        "run folder that is a file",
        "it is a file",
        arguments=("--run_dir", "{folder}/config.json"),
    ),
]

_LAUNCHES = [
    BadInput("RANK without WORLD_SIZE", "needs RANK, WORLD_SIZE", environment={"WORLD_SIZE": None}),
    BadInput("WORLD_SIZE without RANK", "needs RANK, WORLD_SIZE", environment={"RANK": None}),
    BadInput("RANK beyond WORLD_SIZE", "ranks go from 0", environment={"RANK": "2"}),
    BadInput("negative RANK", "as whole numbers", environment={"RANK": "-1"}),
    BadInput("RANK in words", "as whole numbers", environment={"RANK": "first"}),
    BadInput("WORLD_SIZE in words", "as whole numbers", environment={"WORLD_SIZE": "two"}),
    BadInput("empty WORLD_SIZE", "as whole numbers", environment={"WORLD_SIZE": ""}),
    BadInput("LOCAL_RANK in words", "as whole numbers", environment={"LOCAL_RANK": "a"}),
    BadInput("LOCAL_WORLD_SIZE in words", "whole number", environment={"LOCAL_WORLD_SIZE": "two"}),
    BadInput(
        "one process for two stages",
        "but 1 process was started",
        environment={"WORLD_SIZE": "1", "RANK": "0"},
    ),
    BadInput(
        "plain python in a job of Slurm's for two tasks",
        "for 2 tasks (SLURM_NTASKS)",
        environment={
            **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")),
            "SLURM_JOB_ID": "17",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "0",
        },
    ),
    BadInput("no MASTER_PORT", "MASTER_PORT is not set", environment={"MASTER_PORT": None}),
    BadInput("MASTER_PORT in words", "port from 1 to 65535", environment={"MASTER_PORT": "any"}),
    BadInput(
        "two launchers at once",
        "two launchers at once: mpirun started 3 tasks",
        environment={"PMI_RANK": "0", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "3"},
    ),
]

CASES: tuple[BadInput, ...] = (
    *_MISSPELT,
    *_WRONG_VALUES,
    *_UNKNOWN_NAMES,
    *_CONTRADICTIONS,
    *_DOES_NOT_FIT,
    *_FILES,
    *_COMMAND_LINES,
    *_LAUNCHES,
)
"""Every mistake; names are unique."""
