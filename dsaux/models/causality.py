"""Whether a user's layers look ahead: the AuxNet's segment for a causal boundary must not see later tokens.

A language model learns the next token. If the AuxNet could see it, the stages behind would be trained on inputs that
hold the answer. So where nobody has said whether a layer is causal, it is tried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dsaux.config import Config, DsauxConfig, has_aux_net
from dsaux.config_rules import ConfigError, show
from dsaux.data import check_dataset, dataset_facts
from dsaux.launch_check import partition_indices
from dsaux.models import Layer, boundary_specs, build_layer, build_layers
from dsaux.models.auxnet import build_aux_net
from dsaux.models.local_heads import build_local_heads
from dsaux.models.reference import in_one_line, is_reference
from dsaux.models.shapes import SampleSpec, shapes_after

TOLERANCE = 1e-6
"""Largest difference between outputs that should be equal, relative to the largest: rounding of another sum's order."""


def with_causality(layers: Sequence[Layer], *, input_spec: SampleSpec, network: str) -> list[Layer]:
    """The layers, with `causal` found out where it is not stated.

    A layer is causal if it says so (`Layer.causal` or an attribute `causal` of its module) or a trial on the CPU says
    so. What lies behind the first layer that is not is not tried: a boundary is causal if all layers before it are.

    Args:
        layers: the network.
        input_spec: one sample of the data.
        network: the network's name, for errors.

    Raises:
        ConfigError: if a layer of a network for text cannot be tried and does not say what it is.
    """
    found = list(layers)
    specs = [input_spec, *map(SampleSpec, shapes_after((layer.make for layer in layers), input_spec=input_spec))]
    for index, layer in enumerate(layers[:-1]):  # no boundary comes behind the last
        before, after = specs[index], specs[index + 1]
        is_tokens = bool(before.vocabulary) or len(before.shape) == 2
        if not is_tokens or len(after.shape) != 2 or after.shape[0] != before.shape[0]:
            break  # images, or a layer that gives other tokens than it takes
        if not layer.causal:
            module = build_layer(layer, index, seed=0)
            stated = getattr(module, "causal", None)
            try:
                is_causal = stated if isinstance(stated, bool) else looks_causal(module, before)
            except Exception as error:
                if input_spec.vocabulary:
                    raise ConfigError(
                        f"dsaux.model.name {show(network)}: whether layer {show(layer.name)} looks at later tokens "
                        f"cannot be found out ({in_one_line(error)}). Give its module an attribute causal = True or "
                        "False."
                    ) from error
                break
            if not is_causal:
                break
            found[index] = replace(layer, causal=True)
    for layer in layers:
        if layer.whole is not None:
            layer.whole.release()
    return found


def run_layers(dsaux: DsauxConfig, *, num_classes: int, input_spec: SampleSpec) -> list[Layer]:
    """The network of a run; with `causal` found out where it is a user's own and an AuxNet needs to know.

    Raises:
        ConfigError: for a user's network that is wrong.
    """
    layers = build_layers(dsaux.model, num_classes=num_classes, input_spec=input_spec)
    if is_reference(dsaux.model.name) and has_aux_net(dsaux):
        return with_causality(layers, input_spec=input_spec, network=dsaux.model.name)
    return layers


def check_network(config: Config) -> list[str]:
    """Check a user's network in a dry run, before any process group; returns the names of its layers.

    Raises:
        ConfigError: for the first thing that is wrong, a given cut that AuxNet or local heads cannot serve included.
    """
    dsaux = config.dsaux
    check_dataset(dsaux.data)  # a trial takes as much memory as a sample asks for
    facts = dataset_facts(dsaux.data)
    num_classes, input_spec = facts.num_classes, facts.input_spec
    layers = run_layers(dsaux, num_classes=num_classes, input_spec=input_spec)
    names = [layer.name for layer in layers]
    partition = dsaux.pipeline.partition
    is_local = dsaux.pipeline.schedule == "local"
    if (has_aux_net(dsaux) or is_local) and isinstance(partition, tuple) and dsaux.pipeline.stages <= len(layers):
        cuts = partition_indices(partition, names=names, stages=dsaux.pipeline.stages)
        after = boundary_specs(layers, input_spec=input_spec)
        aux, specs = dsaux.aux, [after[cut - 1] for cut in cuts]
        try:
            with torch.device("meta"):
                if is_local:
                    build_local_heads(specs, scores=after[-1])
                else:
                    build_aux_net([input_spec, *specs], depth=aux.depth, width=aux.width, segment=aux.segment)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"dsaux.pipeline.partition is {show(list(partition))}, but {error}") from error
    return names


def looks_causal(module: nn.Module, spec: SampleSpec) -> bool:
    """Try out whether later tokens change earlier outputs. The module's weights are lost.

    Args:
        module: takes (B, T) whole numbers or (B, T, C), gives (B, T, C').
        spec: one sample of its input.

    Raises:
        ValueError: if the outputs are no finite numbers.
    """
    tokens = spec.shape[0]
    module.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A weight that starts at zero, as many do at the end of a residual branch, would hide what the layer sees.
        for weight in module.parameters():
            if weight.is_floating_point():
                weight.normal_(std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 1.0)
        starts = sorted({1, tokens // 2, tokens - 1} - {0})
        plain = spec.random(1, device="cpu")
        rows = [plain]
        for start in starts:
            other = plain.clone()
            if spec.vocabulary:
                step = torch.randint(1, max(2, spec.vocabulary), other[:, start:].shape)
                other[:, start:] = (other[:, start:] + step) % spec.vocabulary
            else:
                other[:, start:] = torch.randn_like(other[:, start:])
            rows.append(other)
        outputs = module(torch.cat(rows))
    if not torch.isfinite(outputs).all():
        raise ValueError("its outputs for random weights are no finite numbers")
    largest = TOLERANCE * float(outputs.abs().max())
    return all(
        float((outputs[row, :start] - outputs[0, :start]).abs().max()) <= largest
        for row, start in enumerate(starts, start=1)
    )
