"""DeepSpeed's private names that dsaux stands on, with their signatures: a DeepSpeed that moves one is noticed."""

from __future__ import annotations

import inspect

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dsaux.engine import AuxPipelineEngine

SIGNATURES = {
    (PipelineEngine, "_train_schedule"): ["self"],
    (PipelineEngine, "_inference_schedule"): ["self", "micro_batches"],
    (PipelineEngine, "_exec_schedule"): ["self", "pipe_schedule"],
    (PipelineEngine, "_aggregate_total_loss"): ["self"],
    (PipelineEngine, "_exec_forward_pass"): ["self", "buffer_id"],
    (PipelineEngine, "_exec_reduce_grads"): ["self"],
    (PipelineEngine, "_exec_optimizer_step"): ["self", "lr_kwargs"],
    (PipelineEngine, "_reentrant_activation_checkpointing"): ["self"],
    (PipelineEngine, "_next_batch"): ["self"],
    (PipelineEngine, "reset_activation_shape"): ["self"],
    (PipelineEngine, "set_dataiterator"): ["self", "iterator"],
    (PipelineEngine, "set_dataloader"): ["self", "loader"],
    (PipelineEngine, "train_batch"): ["self", "data_iter"],
    (PipelineEngine, "set_train_batch_size"): ["self", "train_batch_size"],
    (DeepSpeedEngine, "clip_fp32_gradients"): ["self"],
    (DeepSpeedEngine, "_scheduler_from_config"): ["self", "optimizer"],
    (DeepSpeedZeroOptimizer, "_link_all_hp_params"): ["self"],
    (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"): ["self"],
    (BF16_Optimizer, "_link_all_hp_params"): ["self"],
    (BF16_Optimizer, "_lazy_init_hp_params_optimizer_state"): ["self"],
    (PipelineModule, "_partition_layers"): ["self", "method"],
    (PipelineModule, "_set_bounds"): ["self", "start", "stop"],
    (PipelineModule, "save_state_dict"): ["self", "save_dir", "checkpoint_engine", "exclude_frozen_params"],
    (PipelineModule, "load_state_dir"): ["self", "load_dir", "checkpoint_engine", "strict"],
}


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda value: getattr(value, "__name__", value))
def test_method_exists_with_its_signature(owner: type, name: str) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters) == SIGNATURES[owner, name]


def test_engine_is_chosen_by_a_name_of_the_deepspeed_module() -> None:
    assert deepspeed.PipelineEngine is PipelineEngine
    assert "else PipelineEngine" in inspect.getsource(deepspeed.initialize)


def test_instruction_map_holds_unbound_functions_and_ours_is_complete() -> None:
    assert all(inspect.isfunction(function) for function in PipelineEngine._INSTRUCTION_MAP.values())
    assert set(PipelineEngine._INSTRUCTION_MAP) < set(AuxPipelineEngine._INSTRUCTION_MAP)


def test_attributes_that_have_no_accessor_are_still_there() -> None:
    engine, module = inspect.getsource(PipelineEngine), inspect.getsource(PipelineModule)
    assert "if self._compute_loss and" in engine, "an evaluation without labels switches it off"
    assert "self.pipe_buffers = {" in engine
    assert all(f"self.{name} = " in module for name in ("_layer_specs", "_local_start", "_local_stop"))


def test_counts_and_ranks_that_the_wavefront_reads_are_still_there() -> None:
    source = inspect.getsource(PipelineEngine.train_batch)
    assert (
        source.index("_aggregate_total_loss") < source.index("self.global_steps") < source.index("self.global_samples")
    )
    assert "self.pipe_groups" in inspect.getsource(PipelineParallelGrid)


def test_the_norm_groups_that_are_cut_off_are_still_read_under_these_names() -> None:
    assert "self.mpu" in inspect.getsource(BF16_Optimizer)
    assert "self.model_parallel_group" in inspect.getsource(DeepSpeedZeroOptimizer)


def test_timeouts_of_existing_groups_can_be_set() -> None:
    c10d = torch.distributed.distributed_c10d
    assert list(inspect.signature(c10d._set_pg_timeout).parameters) == ["timeout", "group"]
    assert hasattr(c10d._world, "pg_map")
