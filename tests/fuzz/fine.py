"""Settings that are right: any of them, in any combination, must train. `tests.fuzz.configs` draws from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Sets = Mapping[str, Any]
"""Dotted keys and their values."""

_NO_ZERO: Sets = {"zero_optimization": {"stage": 0}, "data_types": {}}
_NOT_EXACT: Sets = {"dsaux.run.exact_epochs": 0, "dsaux.run.exact_lr": None}
_TWO_EPOCHS: Sets = {"dsaux.run.epochs": 2, "dsaux.run.max_steps": 2, **_NOT_EXACT}


def _optimizer(name: str, **params: Any) -> Sets:
    return {"optimizer": {"type": name, "params": params}}


def _scheduler(name: str, **params: Any) -> Sets:
    return {"scheduler": {"type": name, "params": params}}


def batch(train: int | None, micro: int | None, steps: int | None) -> Sets:
    """The three batch sizes of DeepSpeed."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return dict(zip(keys, (train, micro, steps), strict=True))


def _zero(**keys: Any) -> Sets:
    return {"zero_optimization": {"stage": 1, **keys}, "zero_allow_untested_optimizer": True}


def _exact(**run: Any) -> Sets:
    keys = {"epochs": 2, "max_steps": None, "exact_epochs": 1, "exact_lr": None, **run}
    return {f"dsaux.run.{key}": value for key, value in keys.items()} | batch(16, None, None)


FINE: tuple[Sets, ...] = (
    _optimizer("SGD", lr=0.1, momentum=0.9, nesterov=True),
    _optimizer("SGD", lr=1e-300),
    _optimizer("SGD", lr=0.05, momentum=0.5, dampening=0.1, weight_decay=0),
    _optimizer("Adam", lr=1e-3, betas=[0.9, 0.95], eps=1e-8),
    _optimizer("Adam", lr=1e-3, torch_adam=True, adam_w_mode=False),
    _optimizer("adamw", lr=1e-3, weight_decay=0.1),
    _optimizer("AdamW", lr=1e-3, torch_adam=True, betas=[0.0, 0.0]),
    _optimizer("Adam", lr=1e-3, bias_correction=False),
    _optimizer("RMSprop", lr=1e-3, alpha=0.9, centered=True, momentum=0.5),
    _optimizer("Adagrad", lr=1e-2, initial_accumulator_value=0.1),
    _optimizer("NAdam", lr=1e-3),
    _optimizer("RAdam", lr=1e-3, decoupled_weight_decay=True),
    _optimizer("Adamax", lr=1e-3),
    _optimizer("Adadelta", lr=1.0, rho=0.9),
    _optimizer("Rprop", lr=1e-3, etas=[0.5, 1.2], step_sizes=[1e-6, 1]),
    _optimizer("ASGD", lr=1e-2, lambd=1e-4, t0=1e6),
    _optimizer("Adafactor", lr=1e-2, eps=[None, 1e-3]),
    _scheduler("WarmupLR", warmup_max_lr=0.1, warmup_num_steps=5),
    _scheduler("WarmupLR"),
    _scheduler("WarmupDecayLR", total_num_steps="auto", warmup_max_lr=0.1, warmup_num_steps=1),
    _scheduler("WarmupDecayLR", total_num_steps=1000, warmup_min_lr=0, warmup_max_lr=0.1, warmup_type="linear"),
    _scheduler("WarmupCosineLR", total_num_steps=50, warmup_num_steps=50),
    _scheduler("WarmupCosineLR", total_num_steps="auto", warmup_num_steps=1, cos_min_ratio=1),
    _scheduler("OneCycle", cycle_min_lr=0.001, cycle_max_lr=0.1, cycle_first_step_size=2, cycle_momentum=False),
    _scheduler("OneCycle", cycle_min_lr=0.001, cycle_max_lr=0.1, decay_lr_rate=0.1, decay_step_size=1),
    _scheduler("LRRangeTest", lr_range_test_min_lr=1e-4, lr_range_test_step_size=1, lr_range_test_staircase=True),
    _zero(),
    _zero(reduce_bucket_size=1000, allgather_bucket_size=1000, overlap_comm=True, round_robin_gradients=True),
    {**_zero(compute_grad_norm=False), "gradient_clipping": 0, "data_types": {}},
    _NO_ZERO,
    {"bf16": {"enabled": True}},
    {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
    {"bf16": {"enabled": True}, **_zero(), "data_types": {"grad_accum_dtype": "fp32"}},
    {"gradient_clipping": 0},
    {"gradient_clipping": 1e-12, **_NO_ZERO},
    batch(16, None, 2),
    batch(16, 4, None),
    batch(None, 8, 2),
    batch(None, 2, None),
    {**batch(48, 16, 3), **_TWO_EPOCHS},
    batch(18, 9, 2),
    {"dsaux.data.loader": "dali", "dsaux.data.workers": 0},
    {"dsaux.data.loader": "torch", "dsaux.data.workers": 1},
    {"dsaux.data.name": "synthetic", "dsaux.data.image_size": 9},
    {"dsaux.data.image_size": 16, "dsaux.data.augment": True},
    {"dsaux.data.guard_every": 0},
    {"dsaux.data.train_samples": 61, "dsaux.data.test_samples": 18},
    {"dsaux.model.name": "resnet14", "dsaux.model.zero_init": True, "dsaux.model.dropout": 0},
    {"dsaux.model.name": "wrn10_1", "dsaux.model.zero_init": False, "dsaux.model.dropout": 0.5},
    {"dsaux.run.label_smoothing": 0.99},
    *({"dsaux.pipeline.partition": cut} for cut in ("time", "uniform", "parameters", [])),
    {"dsaux.pipeline.schedule": "1f1b", **_NOT_EXACT},
    {"dsaux.pipeline.schedule": "al", "dsaux.aux.overlap": True, "dsaux.run.nan": "stop"},
    {"dsaux.pipeline.schedule": "local"},
    {"dsaux.pipeline.schedule": "local", "dsaux.aux.transport": "bf16", **_exact()},
    {"dsaux.aux.beta": 1e-12, "dsaux.aux.rho": 0, "dsaux.aux.gamma": 0, "dsaux.aux.width": 0.01},
    {"dsaux.aux.optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "dsaux.aux.segment": "full"},
    {"dsaux.aux.segment": "bottleneck", "dsaux.aux.width": 2},
    {"dsaux.pipeline.schedule": "penalty", **_exact()},
    {"dsaux.pipeline.schedule": "al", **_exact(exact_lr=0.01)},
    {"dsaux.pipeline.schedule": "al", **_exact(max_steps=4)},
    _TWO_EPOCHS,
    {"dsaux.run.max_steps": None},
    {"dsaux.run.eval_every": 1, "dsaux.run.bn_batches": 5, "dsaux.run.eval_batch_size": 10**9},
    {"dsaux.run.eval_every": 10**12, "dsaux.run.log_every": 10**12, "dsaux.run.seed": 2**32 - 1},
    {"dsaux.run.name": "Läufe 跑 🏃", "dsaux.run.timeout_s": 5000},
    {"dsaux.run.epochs": 10**15, "dsaux.run.max_steps": 2, **_NOT_EXACT},
    {"wall_clock_breakdown": True},  # with one stage under 1f1b too
    {"wall_clock_breakdown": True, "steps_per_print": 1},
    {"tensorboard": {"enabled": True, "output_path": "board", "job_name": "job"}},
    {"csv_monitor": {"enabled": True, "output_path": "csv"}},
    {"pipeline": {"activation_checkpoint_interval": 1}, "activation_checkpointing": {"number_checkpoints": 2}},
    {"memory_breakdown": True, "dump_state": True, "steps_per_print": 1},
    {"comms_logger": {"enabled": True, "prof_all": True}},
    {"prescale_gradients": True, "gradient_predivide_factor": 2.0, "communication_data_type": "fp32"},
    {"checkpoint": {}, "disable_python_gc": True},
    {"dsaux.run.checkpoint_every": 1, "dsaux.run.keep": 1},
    {"dsaux.run.checkpoint_every": 0},
    {"dsaux.run.profile_steps": 1},
    {"dsaux.run.channels_last": True},
    {"dsaux.run.compile": True, "dsaux.run.channels_last": True},
    {"dsaux.run.aux_stream": True},
    {"dsaux.run.nan": "skip", "dsaux.aux.overlap": False},
    {"dsaux.run.cuda_graphs": True},
    {"compile": {}, "tensor_parallel": {}, "autotuning": {"enabled": False}},
)
"""What must train, in any combination; a later option sets all that would contradict an earlier one."""
