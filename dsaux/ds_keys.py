"""Table of the keys that DeepSpeed 0.19.8 reads, each with its rule.

DeepSpeed drops a misspelt top-level key without a word, so `dsaux.config_deepspeed` checks every key against
this table. The table is written out, not taken from DeepSpeed: importing that costs seconds. A contract test
compares the two, so a new version is noticed. A key with `refused` is known to DeepSpeed, but has no meaning
or does not work in a decoupled pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsaux.config_rules import Rule

_FLAG = Rule("flag")
_TEXT = Rule("text")
_TEXT_OR_NULL = Rule("text", null=True)
_COUNT = Rule("int", low=1)
_BATCH = Rule("int", low=1, null=True)
_SIZE = Rule("size", low=1, high=10**12)
_DTYPE = Rule("text", choices=("fp32", "bf16"), null=True)
_SENT_DTYPE = Rule("text", choices=("fp32", "bf16", "fp16"), null=True)


_BLOCK_OFF: tuple[dict[str, Any], ...] = ({}, {"enabled": False})


def _off(why: str, *, unless: tuple[Any, ...] = (False,)) -> Rule:
    """A switch that must stay off; writing it down as off is fine, in the forms that DeepSpeed can read."""
    return Rule("any", refused=why, unless=unless)


def _refused(keys: str, why: str, *, unless: tuple[Any, ...] = ()) -> dict[str, Rule]:
    return {key: _off(why, unless=unless) for key in keys.split()}


_STAGE_3 = "it belongs to ZeRO stage 3, and a pipeline runs with stage 0 or 1. Remove it."
_GONE = "DeepSpeed 0.19.8 has this feature no more. Remove the key."
_OFFLOAD = "dsaux keeps weights and optimizer states on the device that uses them. Remove it."

_OWN_CHECKPOINTS = (
    "dsaux writes checkpoints in a form of its own, by layer, with the AuxNet and for any number of stages. Remove it"
    " and use dsaux.run.checkpoint_every and dsaux.run.keep."
)

ZERO_KEYS: Mapping[str, Rule] = {
    "stage": Rule(
        "int",
        choices=(0, 1),
        text="0 or 1 (stages 2 and 3 split gradients or parameters, which pipeline stages cannot do)",
    ),
    "contiguous_gradients": _FLAG,
    "reduce_scatter": _FLAG,
    "reduce_bucket_size": _SIZE,
    "use_multi_rank_bucket_allreduce": _FLAG,
    "allgather_partitions": _FLAG,
    "allgather_bucket_size": Rule("size", low=0, high=10**12),
    "overlap_comm": Rule("flag", null=True),
    "compute_grad_norm": _FLAG,
    "load_from_fp32_weights": Rule("any", refused=_OWN_CHECKPOINTS, unless=(True, False)),
    "elastic_checkpoint": _off(_OWN_CHECKPOINTS),
    "ignore_unused_parameters": _FLAG,
    "legacy_stage1": _off(_GONE),
    "round_robin_gradients": _FLAG,
    "parameter_alignment": _FLAG,
    "log_trace_cache_warnings": _FLAG,
    "enable_sanity_checks": _FLAG,
    **_refused("offload_param offload_optimizer zenflow", _OFFLOAD, unless=(None,)),
    **_refused("cpu_offload cpu_offload_param cpu_offload_use_pin_memory", _OFFLOAD, unless=(False, None)),
    **_refused("memory_efficient_linear pipeline_loading_checkpoint override_module_apply", _STAGE_3, unless=(False,)),
    **_refused("save_muon_momentum_buffer_in_memory allgather_sequential", _STAGE_3, unless=(False,)),
    **_refused("zero_quantized_weights zero_quantized_nontrainable_weights", _STAGE_3, unless=(False,)),
    **_refused("zero_quantized_gradients use_all_reduce_for_fetch_params", _STAGE_3, unless=(False,)),
    **_refused("gather_16bit_weights_on_model_save stage3_allgather_sequential", _STAGE_3, unless=(False,)),
    **_refused("stage3_gather_16bit_weights_on_model_save", _STAGE_3, unless=(False,)),
    **_refused("stage3_gather_fp16_weights_on_model_save", _STAGE_3, unless=(False,)),
    **_refused("stage3_use_all_reduce_for_fetch_params", _STAGE_3, unless=(False,)),
    **_refused("sub_group_size leaf_module zero_hpz_partition_size prefetch_bucket_size", _STAGE_3),
    **_refused("param_persistence_threshold model_persistence_threshold max_live_parameters", _STAGE_3),
    **_refused("max_reuse_distance module_granularity_threshold stage3_prefetch_bucket_size", _STAGE_3),
    **_refused("stage3_param_persistence_threshold stage3_model_persistence_threshold", _STAGE_3),
    **_refused("stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold", _STAGE_3),
    **_refused("mics_shard_size mics_hierarchical_params_gather zeropp_loco_param", _GONE),
}

BF16_KEYS: Mapping[str, Rule] = {
    "enabled": _FLAG,
    "immediate_grad_update": _FLAG,
    "check_grad_overflow": _FLAG,
    "bf16_master_weights_and_grads": _FLAG,
    "bf16_optimizer_states": _FLAG,
}

_NO_FP16 = "its loss scale is one for all stages, which locks them together at every step. Use bf16."
FP16_KEYS: Mapping[str, Rule] = {
    "enabled": Rule("flag", refused=_NO_FP16, unless=(False,)),
    "auto_cast": _FLAG,
    "loss_scale": Rule("number", low=0),
    "initial_scale_power": Rule("int", low=0),
    "loss_scale_window": _COUNT,
    "hysteresis": _COUNT,
    "consecutive_hysteresis": _FLAG,
    "min_loss_scale": _COUNT,
    "fp16_master_weights_and_grads": _off(_NO_FP16),
}

# what the two blocks hold is checked in dsaux.config_deepspeed
OPTIMIZER_KEYS: Mapping[str, Rule] = {"type": _TEXT, "params": Rule("block"), "legacy_fusion": _FLAG}
SCHEDULER_KEYS: Mapping[str, Rule] = {"type": _TEXT, "params": Rule("block")}

_MODEL_PARALLEL = "it needs a tensor-parallel group, which dsaux does not have. Remove it."
PIPELINE_KEYS: Mapping[str, Rule] = {
    "stages": Rule("any"),
    "partition": Rule("any"),
    "seed_layers": _off(
        "dsaux seeds each layer by its index, whatever the partition. Remove it and set dsaux.run.seed."
    ),
    "activation_checkpoint_interval": Rule("int", low=0),
    "pipe_partitioned": _FLAG,  # true in DeepSpeed, but of no effect without a tensor-parallel group
    "grad_partitioned": _FLAG,
    "use_reentrant": Rule("flag", null=True),
}

ACTIVATION_CHECKPOINTING_KEYS: Mapping[str, Rule] = {
    "partition_activations": _off(_MODEL_PARALLEL),
    "number_checkpoints": Rule("int", low=1, null=True),
    "contiguous_memory_optimization": _off(f"DeepSpeed has it with partition_activations alone: {_MODEL_PARALLEL}"),
    "synchronize_checkpoint_boundary": _FLAG,
    "profile": _FLAG,
    "cpu_checkpointing": _FLAG,
}

TENSORBOARD_KEYS: Mapping[str, Rule] = {"enabled": _FLAG, "output_path": _TEXT, "job_name": _TEXT}
CSV_MONITOR_KEYS: Mapping[str, Rule] = TENSORBOARD_KEYS
WANDB_KEYS: Mapping[str, Rule] = {
    "enabled": _FLAG,
    "group": _TEXT_OR_NULL,
    "team": _TEXT_OR_NULL,
    "project": _TEXT,
}
COMET_KEYS: Mapping[str, Rule] = {
    "enabled": _FLAG,
    "samples_log_interval": _COUNT,
    "project": _TEXT_OR_NULL,
    "workspace": _TEXT_OR_NULL,
    "api_key": _TEXT_OR_NULL,
    "experiment_name": _TEXT_OR_NULL,
    "experiment_key": _TEXT_OR_NULL,
    "online": Rule("flag", null=True),
    "mode": Rule("text", choices=("get", "create", "get_or_create"), null=True),
}

FLOPS_PROFILER_KEYS: Mapping[str, Rule] = {
    "enabled": _FLAG,
    "recompute_fwd_factor": Rule("number", low=0),
    "profile_step": _COUNT,
    "module_depth": Rule("int", low=-1),
    "top_modules": _COUNT,
    "detailed": _FLAG,
    "output_file": _TEXT_OR_NULL,
}
COMMS_LOGGER_KEYS: Mapping[str, Rule] = {
    "enabled": _FLAG,
    "prof_all": _FLAG,
    "prof_ops": Rule("texts"),
    "verbose": _FLAG,
    "debug": _FLAG,
}
DATA_TYPES_KEYS: Mapping[str, Rule] = {
    "grad_accum_dtype": _DTYPE,
    "param_dtype": _DTYPE,
    "buffer_dtype": _DTYPE,
    "keep_in_fp32_modules": Rule("texts", also=("auto",)),
}
THROUGHPUT_TIMER_KEYS: Mapping[str, Rule] = {"enabled": _FLAG, "synchronized": _FLAG}

_NO_TENSOR_PARALLEL = "dsaux combines pipeline stages with data-parallel replicas only. Remove it."
_OWN_DATA = "dsaux reads its own data, in one order for all stages. Remove it and see the dsaux.data block."
_ONLY_TRAINING = "it is for inference or generation, and dsaux trains. Remove it."

TOP_LEVEL_KEYS: Mapping[str, Rule] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "optimizer": Rule("block", keys=OPTIMIZER_KEYS),
    "scheduler": Rule("block", keys=SCHEDULER_KEYS),
    "gradient_clipping": Rule("number", low=0),
    "steps_per_print": Rule("int", low=1, null=True),
    "zero_optimization": Rule("block", keys=ZERO_KEYS),
    "zero_allow_untested_optimizer": _FLAG,
    "zero_force_ds_cpu_optimizer": _FLAG,
    "bf16": Rule("block", keys=BF16_KEYS),
    "bfloat16": Rule("block", keys=BF16_KEYS),
    "fp16": Rule("block", keys=FP16_KEYS),
    "data_types": Rule("block", keys=DATA_TYPES_KEYS),
    "communication_data_type": _SENT_DTYPE,
    "prescale_gradients": _FLAG,
    "gradient_predivide_factor": Rule("number", low=0, open_low=True),
    "gradient_allreduce_op": Rule("text", choices=("mean",)),
    "disable_allgather": _FLAG,
    "pipeline": Rule("block", keys=PIPELINE_KEYS),
    "activation_checkpointing": Rule("block", keys=ACTIVATION_CHECKPOINTING_KEYS),
    "checkpoint": _off(_OWN_CHECKPOINTS, unless=_BLOCK_OFF),
    "tensorboard": Rule("block", keys=TENSORBOARD_KEYS),
    "csv_monitor": Rule("block", keys=CSV_MONITOR_KEYS),
    "wandb": Rule("block", keys=WANDB_KEYS),
    "comet": Rule("block", keys=COMET_KEYS),
    "flops_profiler": Rule("block", keys=FLOPS_PROFILER_KEYS),
    "comms_logger": Rule("block", keys=COMMS_LOGGER_KEYS),
    "timers": Rule("block", keys={"throughput": Rule("block", keys=THROUGHPUT_TIMER_KEYS)}),
    "wall_clock_breakdown": _FLAG,
    "memory_breakdown": _FLAG,
    "dump_state": _FLAG,
    "disable_python_gc": _FLAG,
    "log_level": Rule("text", choices=("debug", "info", "warning", "error", "critical"), null=True),
    "managed_gradient_accumulation": Rule(
        "flag", refused="the schedule decides where a step ends. Remove it or set it to true.", unless=(True,)
    ),
    "torch_autocast": _off(
        "autocast would cover DeepSpeed's forward, not the AuxNet and the local losses. Use bf16.", unless=_BLOCK_OFF
    ),
    "dataloader_drop_last": _off(_OWN_DATA),
    "data_efficiency": _off(_OWN_DATA, unless=_BLOCK_OFF),
    **_refused("vocabulary_size", "it is for language models, and dsaux trains image classifiers. Remove it."),
    "tensor_parallel": _off(_NO_TENSOR_PARALLEL, unless=({},)),
    **_refused("sequence_parallel_size data_parallel_size", _NO_TENSOR_PARALLEL),
    **_refused("seq_parallel_communication_data_type", _NO_TENSOR_PARALLEL),
    "expert_parallel": _off("dsaux has no expert layers. Remove it.", unless=(*_BLOCK_OFF, False)),
    "use_data_before_expert_parallelism": _off("dsaux has no expert layers. Remove it."),
    "autotuning": _off("its trial runs know nothing of stages and AuxNet. Remove it.", unless=_BLOCK_OFF),
    **_refused("hybrid_engine weight_quantization", _ONLY_TRAINING, unless=_BLOCK_OFF),
    "compile": _off("DeepSpeed's compiler rewrites one backward pass over the whole network. Remove it.", unless=({},)),
    "aio": _off(_OFFLOAD, unless=_BLOCK_OFF),
    "datastates_ckpt": _off(_OWN_CHECKPOINTS, unless=_BLOCK_OFF),
    **_refused("nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention", _GONE),
    **_refused("graph_harvesting curriculum_learning progressive_layer_drop", _GONE),
    "elasticity": _off(
        "DeepSpeed 0.19.8 removed elastic training. Remove it and set train_batch_size directly.", unless=()
    ),
}
