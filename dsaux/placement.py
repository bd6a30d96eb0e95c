"""Which rank holds which stage of which replica: `dsaux.pipeline.placement` in terms of DeepSpeed's topology.

Launchers number the ranks host by host, so what lies near in rank lies on one host. For K = 2 stages and R = 2 replicas
on two hosts (F0' is stage 0 of the second replica):

    rank             0     1    |    2     3
    stages_near      F0    F1   |    F0'   F1'      a pipeline on each host; replicas meet over the network
    replicas_near    F0    F0'  |    F1    F1'      a stage on each host; pipelines go over the network

Used by `dsaux.assemble` for the module and by `dsaux.engine_state` for what a checkpoint says of itself.
"""

from __future__ import annotations

from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology

STAGES_NEAR, REPLICAS_NEAR = "stages_near", "replicas_near"


def topology_of(placement: str, *, stages: int, replicas: int) -> ProcessTopology:
    """DeepSpeed's topology for a placement, for the argument `topology` of `AuxPipelineModule`.

    Args:
        placement: "stages_near" or "replicas_near", DeepSpeed's own order.
        stages: K.
        replicas: R; K * R processes.
    """
    if placement == REPLICAS_NEAR:
        return PipeDataParallelTopology(num_pp=stages, num_dp=replicas)
    return ProcessTopology(axes=["data", "pipe"], dims=[replicas, stages])


def placement_of(topology: ProcessTopology) -> str:
    """The placement that a topology is."""
    return STAGES_NEAR if topology.get_axis_names()[0] == "data" else REPLICAS_NEAR
