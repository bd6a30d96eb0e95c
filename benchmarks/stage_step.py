"""The step of one stage in a single process: what `benchmarks/device.py` times. Needs neither DeepSpeed nor DALI.

The order is that of a tick under `al`: AuxNet forward, stage forward, local loss, backward, refreshed variable, AuxNet
backward, both optimizer steps. The target of the local loss is the AuxNet's own, as under `penalty`: what a neighbour
would send is not there. The formulas are those of `dsaux.objective`, precisions those of the engine: with bf16 the
stage's weights are bf16 with float32 masters, the AuxNet's are float32 under autocast.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux import objective
from dsaux.graph_capture import Capture, Recording
from dsaux.models import Layer, boundary_specs, build_layer
from dsaux.models.auxnet import build_aux_net
from dsaux.models.mixed_norm import keep_batchnorm_in_float32

BETA, RHO, GAMMA = 10.0, 1.0, 1.0
SGD = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
WARMUP_STEPS = 3
NUM_BATCHES = 4
"""Distinct batches; steps cycle through them."""


@dataclass(frozen=True)
class Stage:
    """One stage of a cut network.

    Attributes:
        layers: the whole network.
        bounds: K+1 layer indices.
        index: the stage k.
        batch: samples in a step.
        image_size: side of the images in pixels.
        num_classes: of the labels.
        segment: kind of the AuxNet's segments.
        width: their width.
        precision: "fp32" or "bf16".
        channels_last: memory format of images and convolutions.
    """

    layers: tuple[Layer, ...]
    bounds: tuple[int, ...]
    index: int
    batch: int
    image_size: int
    num_classes: int
    segment: str = "light"
    width: float = 1.0
    precision: str = "fp32"
    channels_last: bool = True

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.bounds) - 1


class StageStep:
    """A stage with its part of the AuxNet and both optimizers, on random images.

    Args:
        stage: which one.
        device: where it runs.

    Attributes:
        loss: of the last step, a scalar.
    """

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.is_first, self.is_last = stage.index == 0, stage.index == stage.num_stages - 1
        shape = (3, stage.image_size, stage.image_size)
        first, behind = stage.bounds[stage.index], stage.bounds[stage.index + 1]
        after = boundary_specs(list(stage.layers), input_spec=shape)
        self.network: nn.Module = nn.Sequential(
            *(build_layer(stage.layers[index], index, seed=0) for index in range(first, behind))
        )
        self.depth = min(stage.index + 1, stage.num_stages - 1)
        self.aux_net: nn.Module | None = None
        if self.depth:
            specs = [shape, *(after[bound - 1] for bound in stage.bounds[1:-1])]
            self.aux_net = build_aux_net(specs, segment=stage.segment, width=stage.width)
            del self.aux_net.segments[self.depth :]
        self.dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
        layout = torch.channels_last if stage.channels_last else torch.contiguous_format
        for module in (self.network, self.aux_net):
            if module is not None:
                module.to(device=device, memory_format=layout).train()
        self.masters: list[Tensor] = []
        if self.dtype != torch.float32:
            self.masters = [parameter.detach().clone() for parameter in self.network.parameters()]
            for parameter in self.network.parameters():
                parameter.data = parameter.data.to(self.dtype)
            keep_batchnorm_in_float32(self.network)
        self.run_network: Callable[[Tensor], Tensor] = self.network
        self.run_aux_net: Callable[[Tensor], list[Tensor]] | None = self.aux_net
        self.weights = list(self.network.parameters())
        self.aux_weights = [] if self.aux_net is None else list(self.aux_net.parameters())
        self.scales = torch.ones(self.depth, device=device)
        self.variances = torch.ones(self.depth, device=device)
        fused = {"fused": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.SGD([*(self.masters or self.weights), *self.aux_weights], **SGD, **fused)
        draw = torch.Generator().manual_seed(0)
        self.batches = [self._draw(draw, layout) for _ in range(NUM_BATCHES)]
        self.inputs, self.labels = (torch.zeros_like(tensor) for tensor in self.batches[0])
        self.loss = self.refreshed = torch.zeros((), device=device)

    def _draw(self, draw: torch.Generator, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        stage = self.stage
        inputs = torch.randn(stage.batch, 3, stage.image_size, stage.image_size, generator=draw)
        labels = torch.randint(stage.num_classes, (stage.batch,), generator=draw)
        return inputs.to(self.device, self.dtype).contiguous(memory_format=layout), labels.to(self.device)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def load(self, step: int) -> None:
        """Copy a batch to its fixed place."""
        inputs, labels = self.batches[step % NUM_BATCHES]
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)

    def aux_forward(self) -> list[Tensor]:
        """lambda_1 .. lambda_(k+1)."""
        if self.run_aux_net is None:
            return []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            variables: list[Tensor] = self.run_aux_net(self.inputs)
        return variables

    def passes(self) -> None:
        """Everything but the optimizer steps; gradients add up."""
        k, variables = self.stage.index, self.aux_forward()
        stage_input = self._stage_input(None if self.is_first else variables[k - 1])
        outputs = self.run_network(stage_input)
        self._local_loss(outputs, None if self.is_last else variables[k]).backward()
        taps: list[Tensor] = []
        forces: list[Tensor] = []
        if not self.is_first:
            taps.append(variables[k - 1])
            forces.append(self._task_force(variables[k - 1], stage_input))
        if not self.is_last:
            taps.append(variables[k])
            forces.append(objective.match_force(variables[k], outputs, rho=RHO, scale=self.scales[k]))
        if taps:
            torch.autograd.backward(taps, forces)

    def _stage_input(self, variable: Tensor | None) -> Tensor:
        stage_input = self.inputs if variable is None else variable.to(self.dtype).detach()
        return stage_input.requires_grad_(variable is not None)

    def _local_loss(self, outputs: Tensor, target: Tensor | None) -> Tensor:
        """The loss of this stage, kept as `loss`; without a target that of the labels."""
        k = self.stage.index
        if target is None:
            loss = F.cross_entropy(outputs.float(), self.labels)
        else:
            loss = objective.coupling_loss(outputs, target, beta=BETA, scale=self.scales[k])
            self.variances[k] = objective.batch_variance(target)
        self.loss = loss.detach()
        return loss

    def _task_force(self, variable: Tensor, stage_input: Tensor) -> Tensor:
        """The force behind the stage's backward pass; the refreshed variable is made here too."""
        gradient, scale = stage_input.grad, self.scales[self.stage.index - 1]
        assert gradient is not None, "asked for before"
        self.variances[self.stage.index - 1] = objective.batch_variance(variable)
        self.refreshed = objective.refreshed_variable(variable, gradient, beta=BETA, scale=scale)
        return objective.task_force(gradient, gamma=GAMMA).to(variable.dtype)

    def aux_passes(self) -> None:
        """What the AuxNet alone has of `passes`; gradients add up."""
        variables = self.aux_forward()
        taps = variables[-1:] if self.is_first or self.is_last else variables[-2:]
        if taps:
            torch.autograd.backward(taps, [torch.ones_like(tap) for tap in taps])

    def update(self) -> None:
        """Both optimizer steps, and the running variances."""
        if self.masters:
            for master, weight in zip(self.masters, self.weights, strict=True):
                if master.grad is None:
                    master.grad = torch.empty_like(master)
                assert weight.grad is not None, "every weight of a stage has one"
            torch._foreach_copy_([master.grad for master in self.masters], [weight.grad for weight in self.weights])
        self.optimizer.step()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        self.scales.lerp_(self.variances, 1.0 - objective.VARIANCE_MOMENTUM)

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.weights, *self.aux_weights):
            parameter.grad = None


class Eager:
    """Runs a stage's step as PyTorch does by itself."""

    def __init__(self, step: StageStep) -> None:
        self.step = step

    def run(self, index: int) -> None:
        """Step `index`, counted from 0."""
        self.step.load(index)
        self.step.clear()
        self.step.passes()
        self.step.update()

    def run_aux(self, index: int) -> None:
        """The AuxNet's part of a step alone."""
        self.step.clear()
        self.step.aux_passes()


class Compiled(Eager):
    """The same with stage and AuxNet compiled."""

    def __init__(self, step: StageStep) -> None:
        super().__init__(step)
        step.run_network = compiled(step.network)
        if step.aux_net is not None:
            step.run_aux_net = compiled(step.aux_net)


class Graphed(Eager):
    """The same with all but the optimizer captured once and replayed.

    Args:
        step: the stage.
        capture: makes the graphs.
    """

    def __init__(self, step: StageStep, capture: Capture) -> None:
        super().__init__(step)
        self.capture = capture
        self.recordings: dict[Callable[[], None], Recording] = {}

    def run(self, index: int) -> None:
        """The first steps warm up, then one captures, all behind it replay."""
        if index < WARMUP_STEPS:
            with self.capture.warm_up():
                super().run(index)
            return
        self.step.load(index)
        self._replay(self.step.passes)
        self.step.update()

    def run_aux(self, index: int) -> None:
        """Likewise."""
        if index < WARMUP_STEPS:
            with self.capture.warm_up():
                super().run_aux(index)
            return
        self._replay(self.step.aux_passes)

    def _replay(self, work: Callable[[], None]) -> None:
        if work not in self.recordings:
            self.step.clear()  # the capture then makes the gradients, and every replay writes them anew
            self.recordings[work] = self.capture.record(work)
        self.recordings[work].replay()


class AsideStep(StageStep):
    """The same with the segment behind the stage on a stream of its own: its passes run beside the stage's.

        main  | T_1 .. T_k | F_k forward | loss | F_k backward              | T_k .. T_1 backward
        side               | T_(k+1) forward    | T_(k+1) backward          |

    The segments before the stage cannot move: its input waits for them, and their backward pass for its gradient.
    """

    def __init__(self, stage: Stage, device: torch.device) -> None:
        super().__init__(stage, device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def passes(self) -> None:
        """Everything but the optimizer steps; gradients add up."""
        if self.is_last:
            super().passes()
            return
        assert self.aux_net is not None, "there is a segment behind a stage that is not the last"
        segments, k = self.aux_net.segments, self.stage.index
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with autocast:
            variable = functools.reduce(lambda x, segment: segment(x), segments[:k], self.inputs)
        source = variable.detach().requires_grad_(not self.is_first)
        with self._aside(), autocast:
            target = segments[k](source)
        stage_input = self._stage_input(None if self.is_first else variable)
        outputs = self.run_network(stage_input)
        self._join()
        loss = self._local_loss(outputs, target)
        with self._aside():
            force = objective.match_force(target, outputs, rho=RHO, scale=self.scales[k])
            torch.autograd.backward([target], [force])
        loss.backward()
        self._join()
        if not self.is_first:
            assert source.grad is not None, "asked for above"
            torch.autograd.backward([variable], [self._task_force(variable, stage_input) + source.grad])

    def _aside(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block kernels go to the side stream, behind what the present one has been given."""
        if self._side is None:
            return contextlib.nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._side)

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)


class CompiledGraphed(Graphed):
    """Both: what the compiler made, captured."""

    def __init__(self, step: StageStep, capture: Capture) -> None:
        super().__init__(step, capture)
        Compiled(step)


class Bare(Eager):
    """The whole network in a plain loop, compiled: the yardstick for an only stage."""

    def __init__(self, step: StageStep) -> None:
        assert step.stage.num_stages == 1, "the whole network is one stage"
        super().__init__(step)
        step.run_network = compiled(step.network)

    def run(self, index: int) -> None:
        """Step `index`."""
        step = self.step
        inputs, labels = step.batches[index % NUM_BATCHES]
        step.clear()
        loss = F.cross_entropy(step.run_network(inputs).float(), labels)
        loss.backward()
        step.loss = loss.detach()
        step.update()


def compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward pass as one compiled piece.

    `nn.Module.compile` of a container of PyTorch's leaves the container out and compiles block by block.
    """

    def whole(x: Tensor) -> Any:
        return module(x)

    return torch.compile(whole, dynamic=False)


def losses(runner: Eager, steps: int) -> list[float]:
    """Losses of the first steps; waits for the device behind the last one only."""
    found = []
    for index in range(steps):
        runner.run(index)
        found.append(runner.step.loss.detach().clone())
    return [float(loss) for loss in torch.stack(found).tolist()]


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Within the block convolutions give the same bits in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
