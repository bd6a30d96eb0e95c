"""What a checkpoint holds of an engine, as plain tensors and numbers by file, and how it goes back.

`AuxPipelineEngine.save_checkpoint` and `load_checkpoint` call this; `dsaux.checkpoint` brings it to the disk. Weights
and optimizer state are kept by layer, not by stage or rank, so a network goes on in another number of stages, other
bounds, another number of replicas, with or without ZeRO. With the same ones everything is restored to the bit, the
batches under way included.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from dsaux.checkpoint import (
    CheckpointError,
    FileEntry,
    FoundCheckpoint,
    clear_partial,
    describe_failure,
    find_checkpoint,
    layer_model_file,
    partial_folder,
    publish,
    write_file,
)
from dsaux.config import WITHOUT_AUX_NET
from dsaux.config_rules import ConfigError
from dsaux.optim import CosineTail
from dsaux.optim_state import group_settings, load_group_settings, load_parameter_states, parameter_states
from dsaux.placement import REPLICAS_NEAR, placement_of

if TYPE_CHECKING:
    from dsaux.engine import AuxPipelineEngine

AUX_MODEL_FILE, AUX_OPTIM_FILE = "aux_net-model_states.pt", "aux_net-optim_states.pt"


def layer_optim_file(index: int) -> str:
    """Optimizer state of a layer."""
    return f"layer_{index:02d}-optim_states.pt"


def head_files(cut: int) -> tuple[str, str]:
    """Weights and optimizer state of the local head at a cut, by the index of the first layer behind it."""
    return f"head_{cut:02d}-model_states.pt", f"head_{cut:02d}-optim_states.pt"


def stage_file(stage: int) -> str:
    """Schedule and counts of a stage."""
    return f"stage_{stage:02d}-states.pt"


def rank_file(rank: int) -> str:
    """What belongs to one rank."""
    return f"rank_{rank:03d}-states.pt"


def describe_layout(engine: AuxPipelineEngine) -> dict[str, Any]:
    """How the network lies on the ranks: what a checkpoint must share with a run to go back to the bit."""
    layout = {
        "schedule": engine.schedule_name,
        "stages": int(engine.num_stages),
        "replicas": int(engine.dp_world_size),
        "micro_batches": int(engine.micro_batches),
        "bounds": [int(bound) for bound in engine.module.parts],
    }
    if engine.num_stages > 1 and engine.dp_world_size > 1:  # else there is one placement only
        layout["placement"] = placement_of(engine.module.topology())
    return layout


def is_in_exact_epochs(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a run that had gone over to exact back-propagation, not of one under it throughout.

    Args:
        content: its manifest.
    """
    run = content.get("config", {})  # what versions before the entry wrote, where train.py did
    configured = content.get("configured_schedule") or run.get("dsaux", {}).get("pipeline", {}).get("schedule")
    return bool(content["layout"]["schedule"] == "1f1b" and configured != "1f1b")


def collect(engine: AuxPipelineEngine, client_state: Mapping[str, Any]) -> dict[str, Any]:
    """The files that this rank writes; a collective call of all ranks.

    Messages under way are waited for, but no batch is finished: the run goes on as if it had not been saved.

    Args:
        engine: between two steps.
        client_state: the caller's own.

    Returns:
        Contents by file name.
    """
    files: dict[str, Any] = {rank_file(engine.global_rank): _rank_state(engine)}
    optimizer = _require_optimizer(engine)
    for layer, model_file, optim_file in _trained_parts(engine):
        names = [name for name, _ in layer.named_parameters()]
        states = parameter_states(optimizer, [parameter for _, parameter in layer.named_parameters()])
        if engine.grid.get_data_parallel_rank() == 0:
            files[model_file] = _cpu_state(layer)
            files[optim_file] = dict(zip(names, states, strict=True))
    if engine.grid.get_data_parallel_rank() == 0:
        files[stage_file(engine.stage_id)] = {
            "groups": group_settings(optimizer),
            "scheduler": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
            "global_steps": int(engine.global_steps),
            "global_samples": int(engine.global_samples),
            "skipped_steps": int(engine.skipped_steps),
            "client_state": dict(client_state),
        }
    if engine.global_rank == 0 and engine.aux.net is not None:
        files[AUX_MODEL_FILE] = _cpu_state(engine.aux.net)
        files[AUX_OPTIM_FILE] = engine.aux.state_dict()
    return files


def restore(engine: AuxPipelineEngine, found: FoundCheckpoint) -> tuple[dict[str, Any], list[str]]:
    """Put a checkpoint into an engine; every rank calls it and reads its own part.

    Args:
        engine: a new one, or one without batches under way.
        found: the checkpoint.

    Returns:
        The caller's own state, and a sentence for everything that could not be carried over.

    Raises:
        CheckpointError: if the checkpoint is of another network, or a file is not what was written.
    """
    content, layout = found.content, describe_layout(engine)
    if content["num_layers"] != engine.module.parts[-1]:
        raise CheckpointError(
            f"{found.path} is of a network with {content['num_layers']} layers, this has {engine.module.parts[-1]}. "
            "Take the configuration that it was written with."
        )
    _load_layers(engine, found)
    notes = [*_restore_aux(engine, found), *_notes_of_heads(engine, found)]
    # Schedules and counts as in the run where it has the same shape; else those of the stage where batches enter, which
    # no other stage is ahead of.
    same = {key: _saved(content, key) == layout[key] for key in layout}
    is_same = all(same.values()) or (all(same[key] for key in same if key != "schedule") and content["is_drained"])
    leading = 0 if content["layout"]["schedule"] == "local" else content["layout"]["stages"] - 1
    source = engine.stage_id if is_same else leading
    stage = found.load(stage_file(source))
    if engine.lr_scheduler is not None and stage["scheduler"] is not None:
        load_group_settings(_require_optimizer(engine), stage["groups"], with_momentum=engine.cycles_momentum)
        _restore_scheduler(engine.lr_scheduler, stage["scheduler"], steps=stage["global_steps"])
    if engine.aux.scheduler is not None and _aux_has_rested(engine, found):
        _advance(engine.aux.scheduler, steps=stage["global_steps"])
    engine.global_steps = stage["global_steps"]
    engine.global_samples = stage["global_samples"]
    engine.skipped_steps = stage["skipped_steps"]
    if is_same:
        _restore_rank(engine, found.load(rank_file(engine.global_rank)), same_schedule=same["schedule"])
    else:
        notes += _notes_of_layout(content, layout, same)
    return dict(stage["client_state"]), notes


# ---- layers ---------------------------------------------------------------------------------------------------------


def _layers(engine: AuxPipelineEngine) -> Iterator[tuple[int, nn.Module]]:
    """This stage's layers that hold weights or buffers, with their index in the whole network."""
    first = engine.module.parts[engine.stage_id]
    for offset, layer in enumerate(engine.module.forward_funcs):
        if isinstance(layer, nn.Module):
            yield first + offset, layer


def _trained_parts(engine: AuxPipelineEngine) -> Iterator[tuple[nn.Module, str, str]]:
    """What DeepSpeed's optimizer trains on this rank: layers, and a local head; each with its two files."""
    for index, layer in _layers(engine):
        yield layer, layer_model_file(index), layer_optim_file(index)
    head = engine.module.local_head
    if head is not None:
        yield head, *head_files(engine.module.parts[engine.stage_id + 1])


def _load_layers(engine: AuxPipelineEngine, found: FoundCheckpoint) -> None:
    """Layers and local head; a head of a cut that the checkpoint does not have stays as it is."""
    optimizer = _require_optimizer(engine)
    for layer, model_file, optim_file in _trained_parts(engine):
        if layer is engine.module.local_head and model_file not in found.files:
            continue
        load_weights(layer, found, model_file)
        saved = found.load(optim_file)
        named = list(layer.named_parameters())
        load_parameter_states(optimizer, [p for _, p in named], [saved.get(name) for name, _ in named])


def load_network(engine: AuxPipelineEngine, found: FoundCheckpoint) -> None:
    """Load weights and buffers of this stage's layers, and nothing else: for an evaluation.

    Raises:
        CheckpointError: if the checkpoint is of another network, or a file is not what was written.
    """
    for index, layer in _layers(engine):
        load_weights(layer, found, layer_model_file(index))


def load_weights(layer: nn.Module, found: FoundCheckpoint, name: str) -> None:
    """Load one file of weights.

    Raises:
        CheckpointError: if it holds another layer's.
    """
    try:
        layer.load_state_dict(found.load(name))
    except RuntimeError as error:  # PyTorch's, with the names and shapes that do not fit
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{found.path / name} does not fit this network: {one_line(error)}. Give another checkpoint."
        ) from error


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def _cpu_state(module: nn.Module) -> dict[str, Tensor]:
    # Copies: a view would drag the whole flat buffer of ZeRO into the file.
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }


def _require_optimizer(engine: AuxPipelineEngine) -> Any:
    if engine.optimizer is None:
        raise CheckpointError("the engine has no optimizer, so there is nothing to resume. Save module.state_dict().")
    return engine.optimizer


# ---- the AuxNet -----------------------------------------------------------------------------------------------------


def _restore_aux(engine: AuxPipelineEngine, found: FoundCheckpoint) -> list[str]:
    """The segments of boundaries that have stayed where they were; the others start anew."""
    net = engine.aux.net
    if net is None:
        return []
    if AUX_MODEL_FILE not in found.files:
        schedule = found.content["layout"]["schedule"]
        return [f"The checkpoint has no AuxNet (it was written under {schedule}): the AuxNet starts anew."]
    weights, state = found.load(AUX_MODEL_FILE), found.load(AUX_OPTIM_FILE)
    if _aux_has_rested(engine, found):
        state = {**state, "scheduler": None}
    before, now = content_bounds(found), [int(bound) for bound in engine.module.parts]
    # Segment i makes the variable of boundary now[i + 1] from that of boundary now[i].
    source = {segment: pair for pair, segment in enumerate(itertools.pairwise(before[:-1]))}
    origin = [source.get((now[i], now[i + 1])) for i in range(len(now) - 2)]
    fits = [old is not None and _segment_fits(net.segments[new], weights, old) for new, old in enumerate(origin)]
    own = net.state_dict()
    renamed = {f"segments.{old}.": f"segments.{new}." for new, old in enumerate(origin) if fits[new]}
    for name, tensor in weights.items():
        for old_prefix, new_prefix in renamed.items():
            if name.startswith(old_prefix):
                own[new_prefix + name.removeprefix(old_prefix)].copy_(tensor)
    boundaries = [old if fit else None for old, fit in zip(origin, fits, strict=True)]
    engine.aux.load_state_dict(state, renamed=renamed, boundaries=boundaries)
    lost = [new + 1 for new, fit in enumerate(fits) if not fit]
    if not lost:
        return []
    listing = ", ".join(map(str, lost))
    return [f"The AuxNet's segments {listing} of {len(fits)} start anew: the boundaries {before} have become {now}."]


def _notes_of_heads(engine: AuxPipelineEngine, found: FoundCheckpoint) -> list[str]:
    """The same on every rank: heads whose cut the checkpoint does not have start anew."""
    if not engine.module.has_local_heads:
        return []
    cuts = [int(cut) for cut in engine.module.parts[1:-1]]
    lost = [cut for cut in cuts if head_files(cut)[0] not in found.files]
    if not lost:
        return []
    listing, schedule = ", ".join(map(str, lost)), found.content["layout"]["schedule"]
    return [
        f"The local heads of the cuts at layers {listing} start anew: the checkpoint, written under {schedule} with "
        f"the cuts {content_bounds(found)[1:-1]}, has none for them."
    ]


def content_bounds(found: FoundCheckpoint) -> list[int]:
    """The layer indices at which the checkpoint's network was cut, 0 first and the number of layers last."""
    return [int(bound) for bound in found.content["layout"]["bounds"]]


def _segment_fits(segment: nn.Module, weights: Mapping[str, Tensor], index: int) -> bool:
    prefix = f"segments.{index}."
    saved = {name.removeprefix(prefix): tensor.shape for name, tensor in weights.items() if name.startswith(prefix)}
    return saved == {name: tensor.shape for name, tensor in segment.state_dict().items()}


# ---- learning rates -------------------------------------------------------------------------------------------------


def _restore_scheduler(scheduler: Any, state: Mapping[str, Any], *, steps: int) -> None:
    """Put a schedule where the run was; rates and lengths are those of the present configuration."""
    has_tail = "steps_done" in state
    if isinstance(scheduler, CosineTail):
        scheduler.load_state_dict({**scheduler.state_dict(), "steps_done": state["steps_done"] if has_tail else 0})
    elif has_tail:  # the exact epochs that the checkpoint was in are none here, or have no rate of their own
        _advance(scheduler, steps=steps)
    else:
        scheduler.load_state_dict(state)


def _aux_has_rested(engine: AuxPipelineEngine, found: FoundCheckpoint) -> bool:
    """Whether the AuxNet is trained now and was not when the checkpoint was written: its schedule has fallen behind."""
    return found.content["layout"]["schedule"] in WITHOUT_AUX_NET and engine.schedule_name not in WITHOUT_AUX_NET


def _advance(scheduler: Any, *, steps: int) -> None:
    """Take a new schedule to where it is after so many steps."""
    for _ in range(steps):
        scheduler.step()


# ---- one rank -------------------------------------------------------------------------------------------------------


def _rank_state(engine: AuxPipelineEngine) -> dict[str, Any]:
    return {
        "random": _random_state(engine.device),
        "figures": {
            "train_loss_sum": engine.train_loss_sum.cpu().clone(),
            "train_hits": engine.train_hits.cpu().clone(),
            "train_samples": int(engine.train_samples),
            "train_batches": int(engine.train_batches),
            "last_loss": engine._last_loss.detach().cpu().clone(),
            "mismatch": engine.boundary_mismatch.cpu().clone(),
            "adjoint": engine.boundary_adjoint.cpu().clone(),
            "loss_is_known": engine.loss_is_known,
        },
        "wavefront": engine.wavefront.state_dict(),
        "received": None if engine.receiver is None else engine.receiver.state_dict(),
        "guard": engine.guard_state(),
    }


def _restore_rank(engine: AuxPipelineEngine, state: Mapping[str, Any], *, same_schedule: bool) -> None:
    _set_random_state(state["random"], engine.device)
    figures = state["figures"]
    for name in ("train_loss_sum", "train_hits"):
        getattr(engine, name).copy_(figures[name])
    engine.train_samples, engine.train_batches = figures["train_samples"], figures["train_batches"]
    engine._last_loss = figures["last_loss"].to(engine.device)
    engine.loss_is_known = bool(figures.get("loss_is_known", True))
    if not same_schedule:  # saved with no batch under way; other schedules have other boundary figures and lags
        return
    engine.boundary_mismatch = figures["mismatch"].to(engine.device)
    engine.boundary_adjoint = figures["adjoint"].to(engine.device)
    engine.wavefront.load_state_dict(state["wavefront"])
    if engine.sender is not None:
        engine.sender.wait()  # nothing of an earlier run is under way any more
    if engine.receiver is not None and state["received"] is not None:
        engine.receiver.load_state_dict(state["received"])
    engine.load_guard_state(state["guard"])


def _saved(content: Mapping[str, Any], key: str) -> Any:
    # Checkpoints from before there was a choice have DeepSpeed's own placement.
    return content["layout"].get(key, REPLICAS_NEAR) if key == "placement" else content["layout"][key]


def _notes_of_layout(content: Mapping[str, Any], layout: Mapping[str, Any], same: Mapping[str, bool]) -> list[str]:
    changed = [f"{key} {_saved(content, key)} to {layout[key]}" for key in layout if not same[key]]
    notes = [
        f"Layers and their optimizer state were dealt anew ({', '.join(changed)}): the run goes on from the same "
        "weights, but not to the bit as it would have."
    ]
    if not content["is_drained"]:
        under_way = content["layout"]["stages"] - 1
        late = "last" if content["layout"]["schedule"] == "local" else "first"
        notes.append(
            f"The {under_way} batches that were under way are dropped: the {late} stages miss up to {under_way} "
            "updates."
        )
    return notes


def _random_state(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))


# ---- all ranks together ---------------------------------------------------------------------------------------------


def write_together(
    folder: Path,
    name: str,
    *,
    engine: AuxPipelineEngine,
    client_state: Mapping[str, Any],
    content: Mapping[str, Any],
    latest: bool,
) -> None:
    """Write a checkpoint, each rank its part; a collective call of all ranks.

    Raises:
        CheckpointError: on all ranks, if one could not write; the checkpoints that were there still are.
    """
    _agree([_attempt(partial(_make_partial, folder, name))] if engine.global_rank == 0 else [], folder, name)
    files = collect(engine, client_state)
    written: list[FileEntry] = []
    outcome = _attempt(partial(_write_files, partial_folder(folder, name), files, written))
    parts = all_ranks((outcome, written))
    _agree_on([outcome for outcome, _ in parts], folder, name, is_first=engine.global_rank == 0)
    entries = [entry for _, part in parts for entry in part]
    step = partial(publish, folder, name, entries=entries, content=content, latest=latest)
    _agree([_attempt(step)] if engine.global_rank == 0 else [], folder, name)


def find_together(path: Path) -> FoundCheckpoint:
    """Find the newest whole checkpoint on rank 0 and tell all ranks; a collective call.

    Raises:
        ConfigError: on all ranks, if there is none.
    """
    answer: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = find_checkpoint(path)
        except ConfigError as error:
            answer[0] = str(error)
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(answer[0])
    found: FoundCheckpoint = answer[0]
    return found


def all_ranks(value: Any) -> list[Any]:
    """What each rank gives, by global rank; a collective call of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _make_partial(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clear_partial(folder)
    partial_folder(folder, name).mkdir()


def _write_files(folder: Path, files: Mapping[str, Any], written: list[FileEntry]) -> None:
    for name, state in files.items():
        written.append(write_file(folder / name, state))


def _attempt(action: Callable[[], object]) -> str | None:
    """Why it failed, for the other ranks to know; None if it did not."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except CheckpointError as error:
        return str(error)
    return None


def _agree(outcomes: list[str | None], folder: Path, name: str) -> None:
    """Rank 0 has acted; all ranks learn how it went."""
    answer: list[Any] = [outcomes[0] if outcomes else None]
    torch.distributed.broadcast_object_list(answer, src=0)
    _agree_on([answer[0]], folder, name, is_first=bool(outcomes))


def _agree_on(outcomes: list[str | None], folder: Path, name: str, *, is_first: bool) -> None:
    reason = describe_failure(outcomes)
    if reason is None:
        return
    if is_first:
        clear_partial(folder)
    raise CheckpointError(
        f"the checkpoint {folder / name} could not be written: {reason}. The checkpoints before it are still there. "
        "Make room or give another --run_dir."
    )
