"""DeepSpeed's own part of a configuration: what is let through, what is refused, and what DeepSpeed makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from dsaux.config import Config, ConfigError, check_launch, config_from_dict, resolved_deepspeed
from dsaux.config_deepspeed import torch_optimizer_of
from dsaux.ds_optim_keys import SCHEDULERS, TORCH_OPTIMIZERS
from tests.bad_input import REMOVE, good_config


def _config(sets: dict[str, Any]) -> Config:
    return config_from_dict(good_config(sets))


FINE: list[dict[str, Any]] = [
    {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}, "zero_allow_untested_optimizer": True},
    {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
    {"zero_optimization": {"stage": 0, "overlap_comm": None}},
    {
        "zero_optimization": {"stage": 1, "compute_grad_norm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0,
    },
    {"bf16": {"enabled": True}},
    {"bfloat16": {"enabled": True, "check_grad_overflow": False}},
    {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    },
    {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16"},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    },
    {"data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["norm"]}},
    {"fp16": {"enabled": False, "loss_scale": 0}},
    {"train_batch_size": REMOVE, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
    {"train_batch_size": 32, "train_micro_batch_size_per_gpu": None},
    {"gradient_clipping": 0},
    {"wall_clock_breakdown": True, "steps_per_print": 5, "memory_breakdown": True, "dump_state": True},
    {"tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"}},
    {
        "csv_monitor": {"enabled": True},
        "wandb": {"enabled": False, "group": None},
        "comet": {"enabled": False},
    },
    {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": True}},
    {"pipeline": {"stages": 2, "activation_checkpoint_interval": 1, "use_reentrant": False}},
    {"pipeline": {"stages": "auto", "partition": "best", "pipe_partitioned": True}},
    {"flops_profiler": {"enabled": True, "profile_step": 3, "module_depth": -1, "output_file": None}},
    {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "prof_ops": ["all_reduce"]}},
    {"checkpoint": {}},
    {"timers": {"throughput": {"enabled": True, "synchronized": False}}},
    {"communication_data_type": "fp16", "prescale_gradients": True, "gradient_predivide_factor": 2.0},
    {"autotuning": {"enabled": False}, "tensor_parallel": {}, "aio": {}},
    {"scheduler": REMOVE},
]


@pytest.mark.parametrize("sets", FINE)
def test_block_is_let_through_unchanged(sets: dict[str, Any]) -> None:
    document = good_config(sets)
    del document["dsaux"]
    assert _config(sets).deepspeed == document


@pytest.mark.parametrize(
    "sets",
    [sets for sets in FINE if "bfloat16" not in sets],
    ids=lambda sets: " ".join(sets),
)
def test_what_is_let_through_is_fine_for_deepspeed(sets: dict[str, Any]) -> None:
    config = _config(sets)
    launch = check_launch(config, world_size=2)
    found = DeepSpeedConfig(resolved_deepspeed(config, launch, total_steps=10))
    assert found.train_batch_size == launch.train_batch_size
    assert found.train_micro_batch_size_per_gpu == launch.micro_batch_size
    assert found.gradient_accumulation_steps == launch.gradient_accumulation_steps


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true"),
    ({"zero_optimization": True}, "zero_optimization is true"),
    ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "offload_param"),
    ({"zero_optimization": {"stage3_max_live_parameters": 1}}, "ZeRO stage 3"),
    ({"zero_optimization": {"legacy_stage1": True}}, "legacy_stage1"),
    ({"zero_optimization": {"mics_shard_size": 2}}, "no more"),
    ({"zero_optimization": {"compute_grad_norm": False}}, "it needs stage 1"),
    (
        {
            "zero_optimization": {"stage": 1, "compute_grad_norm": False},
            "zero_allow_untested_optimizer": True,
        },
        "clipping needs the norm",
    ),
    (
        {
            "zero_optimization": {"stage": 1, "compute_grad_norm": False},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": REMOVE,
        },
        "gradient_clipping 1",  # DeepSpeed's default
    ),
    ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, "two names of one block"),
    ({"bfloat16": {"enabled": True}, "fp16": {"enabled": True}}, "bfloat16.enabled and fp16.enabled"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "without ZeRO"),
    (
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        "without bf16.bf16_master_weights_and_grads",
    ),
    ({"bf16": {"enabled": "auto"}}, 'bf16.enabled is "auto"'),
    ({"data_types": {"param_dtype": "bf16"}}, "the weights are fp32"),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "with bf16 weights and without ZeRO",
    ),
    ({"data_types": {"grad_accum_dtype": "fp16"}}, 'one of "fp32", "bf16"'),
    (
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1, "compute_grad_norm": False},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0,
        },
        "Remove one of the two",
    ),
    ({"train_batch_size": "auto"}, 'train_batch_size is "auto"'),
    ({"train_batch_size": None}, "are both missing"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    ({"pipeline": {"partition": "uniform2"}}, "pipeline.partition"),
    ({"pipeline": {"seed_layers": True}}, "seed_layers"),
    ({"activation_checkpointing": {"partition_activations": True}}, "tensor-parallel"),
    ({"activation_checkpointing": {"contiguous_memory_optimization": True}}, "partition_activations alone"),
    ({"checkpoint": {"tag_validation": "Warn"}}, "use dsaux.run.checkpoint_every"),
    ({"zero_optimization": {"elastic_checkpoint": True}}, "use dsaux.run.checkpoint_every"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
    ({"managed_gradient_accumulation": False}, "where a step ends"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2"),
    ({"data_efficiency": {"enabled": True}}, "data_efficiency"),
    ({"compile": {"deepcompile": True}}, "compile is"),
    ({"amp": {"enabled": True}}, "amp is"),
    ({"amp": {"enabled": False}}, "amp is"),  # DeepSpeed refuses to see what it removed, even switched off
    ({"elasticity": {"enabled": False}}, "elasticity is"),
    ({"zero_optimization": {"mics_shard_size": -1}}, "no more"),
    ({"optimizer": {"params": {}}}, "optimizer.type is missing"),
    ({"optimizer": {"type": 3}}, "optimizer.type is 3"),
    ({"optimizer": {"type": "LBFGS"}}, "calls the model again"),
    ({"optimizer": {"type": "MuSGD"}}, "mup"),
    ({"optimizer": {"type": "muon"}}, "the weight of a convolution"),
    ({"optimizer": {"type": "adamw", "params": {"amsgrad": True}}}, "no AMSGrad"),
    ({"optimizer.params.maximize": True}, "climbs the loss"),
    ({"optimizer": {"type": "NAdam", "params": {"capturable": True}}}, "it is for CUDA graphs"),
    ({"optimizer.params": {"lr": 0.1, "fused": True, "foreach": True}}, "are both true; they are two ways"),
    ({"dsaux.aux.optimizer": {"type": "Adam", "params": {"capturable": True}}}, "params.capturable is true"),
    ({"optimizer.params.lr": 1e308}, "optimizer.params.lr is 1e+308; it must be a number > 0 and <= 3e+38"),
    (
        {"optimizer": {"type": "Adam", "params": {"foreach": True}}},
        "optimizer.params.foreach is not a known key",
    ),
    ({"optimizer": {"type": "Rprop", "params": {"etas": [1.1, 1.2]}}}, "the first must be < 1"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0, 0.9]}}}, "betas is [0, 0.9]; PyTorch takes no whole"),
    *(
        ({"optimizer": {"type": "Adafactor", "params": {"eps": eps}}}, "must be a list [number or null, number]")
        for eps in (0.1, None, [0.1], [None, None], [None, -1], [-1, 0.1], [True, 0.1], "ab")
    ),
    (
        {"optimizer": {"type": "SGD", "params": {"nesterov": True, "momentum": 0.9, "dampening": 0.1}}},
        "nesterov",
    ),
    ({"scheduler": {"params": {}}}, "scheduler.type is missing"),
    ({"scheduler": {"type": ["WarmupLR"]}}, "scheduler.type is"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params is missing"),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}, "warmup_max_lr is missing"),
    ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}}, "cycle_max_lr is missing"),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.2, "cycle_max_lr": 0.1}}},
        "above cycle_max_lr",
    ),
    ({"scheduler.params.total_num_steps": "automatic"}, 'or "auto"'),
    ({"scheduler.params.warmup_num_steps": 0}, "warmup_num_steps is 0"),
    ({"scheduler.params": {"total_num_steps": 9, "warmup_num_steps": 10}}, "warmup_num_steps is 10, above total"),
    ({"scheduler.params": {"total_num_steps": 999}}, "warmup_num_steps is missing and 1000 by default, above total"),
    (
        {"scheduler.params": {"total_num_steps": 1, "warmup_num_steps": 1}},
        "warmup_num_steps is 1, which DeepSpeed takes as 2, above total_num_steps, which is 1. Set warmup_num_steps to",
    ),
    ({"scheduler.params.warmup_type": "linaer"}, 'Did you mean "linear"'),
    ({"scheduler.params.cos_min_ratio": 1.5}, "cos_min_ratio is 1.5"),
]


@pytest.mark.parametrize(("sets", "says"), REFUSED)
def test_block_is_refused(sets: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(sets)
    assert says in str(caught.value)


# ---- optimizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["adam", "ADAMW", "lion", "adagrad"])
def test_deepspeeds_own_optimizers_are_found_in_any_case(given: str) -> None:
    own = {"type": "SGD"}
    assert _config({"optimizer": {"type": given}, "dsaux.aux.optimizer": own}).deepspeed["optimizer"]["type"] == given


def test_parameter_that_is_in_no_table_is_looked_up_in_pytorch() -> None:
    _config({"optimizer.params": {"lr": 0.1, "fused": False}})
    with pytest.raises(ConfigError, match="Did you mean fused"):
        _config({"optimizer.params": {"lr": 0.1, "fussed": False}})


@pytest.mark.parametrize(
    ("block", "name", "params"),
    [
        ({"type": "SGD", "params": {"lr": 0.1}}, "SGD", {"lr": 0.1}),
        ({"type": "SGD"}, "SGD", {}),
        ({"type": "adagrad", "params": {"lr": 0.1}}, "Adagrad", {"lr": 0.1}),
        ({"type": "Adam"}, "AdamW", {"weight_decay": 0.0}),
        ({"type": "adam", "params": {"adam_w_mode": False}}, "Adam", {"weight_decay": 0.0}),
        (
            {"type": "AdamW", "params": {"adam_w_mode": False, "set_grad_none": True}},
            "AdamW",
            {"weight_decay": 0.0},
        ),
        ({"type": "AdamW", "params": {"torch_adam": True}}, "AdamW", {"weight_decay": 0.01}),
        (
            {"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}},
            "Adam",
            {"weight_decay": 0.0},
        ),
        (
            {"type": "Adam", "params": {"weight_decay": 0.1, "bias_correction": True}},
            "AdamW",
            {"weight_decay": 0.1},
        ),
    ],
)
def test_twin_in_pytorch(block: dict[str, Any], name: str, params: dict[str, Any]) -> None:
    assert torch_optimizer_of(block, path="optimizer") == (name, params)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_name_that_deepspeed_reports_has_the_same_twin(name: str) -> None:
    document = good_config({"optimizer": {"type": name, "params": {"lr": 0.1, "momentum": 0.5}}})
    found = DeepSpeedConfig({"train_batch_size": 2, "optimizer": document["optimizer"]})
    reported = {"type": found.optimizer_name, "params": found.optimizer_params}
    assert torch_optimizer_of(reported, path="optimizer") == torch_optimizer_of(document["optimizer"], path="optimizer")


@pytest.mark.parametrize("block", [{"type": "Lamb"}, {"type": "Adam", "params": {"bias_correction": False}}])
def test_optimizer_without_twin_asks_for_one_of_the_auxnet(block: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"Set dsaux\.aux\.optimizer"):
        torch_optimizer_of(block, path="optimizer")


VALUES = {
    "betas": [0.9, 0.99],
    "etas": [0.5, 1.2],
    "step_sizes": [1e-6, 50],
    "nesterov": True,
    "momentum": 0.9,
    "dampening": 0,
    "beta2_decay": -0.8,
    "d": 1.0,
    "rho": 0.9,
    "maximize": False,
    "foreach": None,
    "amsgrad": False,
    "centered": True,
    "decoupled_weight_decay": True,
}


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_every_torch_optimizer_is_built_from_what_is_let_through(name: str) -> None:
    params = {key: VALUES.get(key, 0.1) for key in TORCH_OPTIMIZERS[name]}
    if name == "Adafactor":
        params["eps"] = [None, 1e-3]
    found = _config({"dsaux.aux.optimizer": {"type": name, "params": params}}).dsaux.aux.optimizer
    assert found is not None
    built = getattr(torch.optim, found["type"])([torch.zeros(2, requires_grad=True)], **found["params"])
    assert isinstance(built, torch.optim.Optimizer)


SCHEDULE_PARAMS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_max_lr": None, "warmup_num_steps": 3},
    "WarmupDecayLR": {"total_num_steps": 10, "warmup_max_lr": 0.1, "warmup_num_steps": 3},
    "WarmupCosineLR": {"total_num_steps": 10, "warmup_num_steps": 3, "warmup_min_ratio": 0.01},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 5},
    "LRRangeTest": {"lr_range_test_min_lr": 0.01},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_is_built_from_what_is_let_through(name: str) -> None:
    from deepspeed.runtime import lr_schedules

    block = _config({"scheduler": {"type": name, "params": SCHEDULE_PARAMS[name]}}).deepspeed["scheduler"]
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    schedule = getattr(lr_schedules, block["type"])(optimizer, **block["params"])
    schedule.step()
    assert schedule.get_last_lr()[0] >= 0
