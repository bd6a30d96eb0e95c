"""Where a run's BatchNorm is, for `dsaux.launch_check`: it alone needs a micro-batch of two samples.

BatchNorm fails on one sample of one pixel, and on more pixels its statistics would be those of a single sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsaux.config import Config, has_aux_net
from dsaux.config_rules import ConfigError
from dsaux.data import dataset_facts
from dsaux.launch_check import partition_indices
from dsaux.models import Layer, boundary_specs, build_layers
from dsaux.models.auxnet import make_segment
from dsaux.models.local_heads import make_local_head
from dsaux.models.shapes import SampleSpec


def batchnorm_owner(config: Config) -> str | None:
    """The part of a run that has a BatchNorm, "the network", "the AuxNet" or "the local heads"; None without any.

    Args:
        config: checked, its cuts included. Where these are yet to be measured, all layers are looked at.
    """
    facts = dataset_facts(config.dsaux.data)
    spec = facts.input_spec
    layers = build_layers(config.dsaux.model, num_classes=facts.num_classes, input_spec=spec)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        if _has_batchnorm([layer.make() for layer in layers]):
            return "the network"
        if has_aux_net(config.dsaux) and _has_batchnorm(_segments(config, layers, input_spec=spec)):
            return "the AuxNet"
        if config.dsaux.pipeline.schedule == "local" and _has_batchnorm(_heads(config, layers, input_spec=spec)):
            return "the local heads"
    return None


def _has_batchnorm(modules: Sequence[nn.Module]) -> bool:
    return any(isinstance(part, _BatchNorm) for module in modules for part in module.modules())


def _cuts(config: Config, layers: Sequence[Layer]) -> tuple[int, ...] | None:
    """The given cuts; None if the run will choose them."""
    pipeline = config.dsaux.pipeline
    if isinstance(pipeline.partition, str):
        return None
    return partition_indices(pipeline.partition, names=[layer.name for layer in layers], stages=pipeline.stages)


def _segments(config: Config, layers: list[Layer], *, input_spec: SampleSpec) -> list[nn.Module]:
    """The AuxNet's segments at the given cuts, or the first segment at each possible one."""
    aux, cuts = config.dsaux.aux, _cuts(config, layers)
    after = boundary_specs(layers, input_spec=input_spec)
    if cuts is None:
        pairs = [(input_spec, spec) for spec in after[:-1]]
    else:
        pairs = list(itertools.pairwise([input_spec, *(after[cut - 1] for cut in cuts)]))
    made = []
    for before, spec in pairs:
        try:
            segment = make_segment(
                before, spec, kind=aux.segment, depth=aux.depth, width=aux.width, first=before is input_spec
            )
        except ConfigError:
            raise
        except ValueError:  # no segment leads there, so no cut lies there
            continue
        made.append(segment)
    return made


def _heads(config: Config, layers: list[Layer], *, input_spec: SampleSpec) -> list[nn.Module]:
    """The local heads at the given cuts, or at all possible ones."""
    cuts = _cuts(config, layers) or range(1, len(layers))
    after = boundary_specs(layers, input_spec=input_spec)
    made = []
    for cut in cuts:
        try:
            made.append(make_local_head(after[cut - 1], scores=after[-1]))
        except ValueError:  # as above
            continue
    return made
