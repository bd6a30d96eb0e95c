"""What each instruction does to buffers, messages and gradients: the table that `replay` and `check` follow.

A new instruction needs one entry here and no change in the checker. For example, an auxiliary variable that
leaves for the stage before without blocking::

    SendVariable: Effect("sV", reads=(Slot("refreshed"),), sends=Message("variable", to=-1, blocking=False)),
    RecvVariable: Effect("rV", writes=(Slot("target"),), receives=Message("variable", to=-1, blocking=False)),
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsaux.schedules import instructions as ins


class Where(enum.Enum):
    """The stages on which a slot exists."""

    ALL = "all stages"
    FIRST = "the first stage"
    LAST = "the last stage"
    NOT_FIRST = "all stages but the first"
    NOT_LAST = "all stages but the last"

    def includes(self, stage: int, num_stages: int) -> bool:
        """Whether `stage` of `num_stages` is among them."""
        first, last = stage == 0, stage == num_stages - 1
        return {
            Where.ALL: True,
            Where.FIRST: first,
            Where.LAST: last,
            Where.NOT_FIRST: not first,
            Where.NOT_LAST: not last,
        }[self]


@dataclass(frozen=True)
class Slot:
    """A named place for one micro-batch's tensors, in each pipeline buffer or once per rank.

    Its content is needed until each kind of instruction in the rank's stream that reads the slot has read it.

    Attributes:
        name: key of the engine's `pipe_buffers`, or the attribute that holds it.
        where: stages that have it.
        per_rank: True if the engine holds one for all buffers, as DeepSpeed does for `loss` and `grad_layer`.
    """

    name: str
    where: Where = Where.ALL
    per_rank: bool = False


@dataclass(frozen=True)
class Message:
    """A tensor that goes to a neighbour; a send and its receive carry the same Message.

    Attributes:
        name: what travels.
        to: +1 for the next stage, -1 for the one before.
        blocking: True if the send ends only when the receive is reached, as DeepSpeed's `p2p.send` may; False
            if it ends at once (the send keeps the tensor itself alive, so its slot is free).
        group: messages of one group between two stages arrive in the order in which they were sent.
    """

    name: str
    to: int
    blocking: bool = True
    group: str = "pipe"


@dataclass(frozen=True)
class Collective:
    """A collective over all stages; every stage must issue the same ones in the same order.

    Attributes:
        name: what is summed.
        blocking: False if it is only started; what `waits` for it ends when all stages have started it.
    """

    name: str
    blocking: bool = True


@dataclass(frozen=True)
class Effect:
    """Everything the checker knows about an instruction.

    Attributes:
        code: short name in grids.
        reads: slots that must hold the same micro-batch.
        writes: slots that receive it; what they held must not be needed any more.
        loads: True if it takes the next micro-batch of the rank's data iterator.
        sends: message that leaves, of the micro-batch read.
        receives: message that arrives; its micro-batch is the one written.
        collective: collective over all stages that it issues.
        waits: name of a started collective that it waits for.
        owes: gradients that a later instruction must add for this micro-batch, if the schedule trains.
        adds: gradients that it adds to.
        reduces: gradients that it makes final; nothing may be owed or added after it.
        steps: gradients that it uses up; they must be final.
        once: True if every stage does it exactly once per micro-batch.
    """

    code: str
    reads: tuple[Slot, ...] = ()
    writes: tuple[Slot, ...] = ()
    loads: bool = False
    sends: Message | None = None
    receives: Message | None = None
    collective: Collective | None = None
    waits: str | None = None
    owes: str | None = None
    adds: str | None = None
    reduces: str | None = None
    steps: str | None = None
    once: bool = False


_ACTIVATION = Message("activation", to=+1)
_GRADIENT = Message("gradient", to=-1)
_AUX_SUM = Collective("aux_sum", blocking=False)

_INPUTS, _OUTPUTS, _LABELS = Slot("inputs"), Slot("outputs"), Slot("labels", Where.LAST)
_INPUT_GRAD = Slot("inputs.grad", Where.NOT_FIRST)
_GRAD_LAYER = Slot("grad_layer", Where.NOT_LAST, per_rank=True)
_PIPE_LOSS, _LOCAL_LOSS = Slot("loss", Where.LAST, per_rank=True), Slot("loss", per_rank=True)
_BATCH, _VARIABLES, _STAGE_INPUTS = Slot("batch"), Slot("variables"), Slot("stage_inputs")
_STAGE_INPUT_GRAD = Slot("stage_inputs.grad", Where.NOT_FIRST)

EFFECTS: Mapping[type[ins.PipeInstruction], Effect] = MappingProxyType(
    {
        # DeepSpeed's 1F1B and inference
        ins.LoadMicroBatch: Effect("L", writes=(Slot("inputs", Where.FIRST), _LABELS), loads=True),
        ins.ForwardPass: Effect(
            "F", reads=(_INPUTS, _LABELS), writes=(_OUTPUTS, _PIPE_LOSS), owes="weights", once=True
        ),
        ins.BackwardPass: Effect(
            "B", reads=(_OUTPUTS, _GRAD_LAYER, _PIPE_LOSS), writes=(_INPUT_GRAD,), adds="weights", once=True
        ),
        ins.SendActivation: Effect("sA", reads=(_OUTPUTS,), sends=_ACTIVATION),
        ins.RecvActivation: Effect("rA", writes=(_INPUTS,), receives=_ACTIVATION),
        ins.SendGrad: Effect("sG", reads=(_INPUTS, _INPUT_GRAD), sends=_GRADIENT),
        ins.RecvGrad: Effect("rG", reads=(_OUTPUTS,), writes=(_GRAD_LAYER,), receives=_GRADIENT),
        ins.ReduceTiedGrads: Effect("RT", collective=Collective("tied_gradients")),
        ins.ReduceGrads: Effect("R", reduces="weights"),
        ins.OptimizerStep: Effect("S", steps="weights"),
        # a local step
        ins.LoadReplicaBatch: Effect("L", writes=(_BATCH,), loads=True),
        ins.AuxForward: Effect("aF", reads=(_BATCH,), writes=(_VARIABLES,), owes="aux_net", once=True),
        ins.LocalForward: Effect(
            "F",
            reads=(_BATCH, _VARIABLES),
            writes=(_STAGE_INPUTS, _OUTPUTS, _LOCAL_LOSS),
            owes="weights",
            once=True,
        ),
        ins.LocalBackward: Effect(
            "B", reads=(_STAGE_INPUTS, _LOCAL_LOSS), writes=(_STAGE_INPUT_GRAD,), adds="weights", once=True
        ),
        ins.AuxBackward: Effect("aB", reads=(_VARIABLES, _OUTPUTS, _STAGE_INPUT_GRAD), adds="aux_net", once=True),
        ins.ReduceAuxGrads: Effect("aR", collective=_AUX_SUM, reduces="aux_net"),
        ins.AuxOptimizerStep: Effect("aS", waits="aux_sum", steps="aux_net"),
    }
)
"""Effects of DeepSpeed's instructions and of ours. `ReduceTiedGrads` counts as a collective of all stages,
the worst case that its docstring names; `ReduceGrads` and `OptimizerStep` act among a stage's replicas."""
