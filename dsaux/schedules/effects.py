"""What each instruction does to buffers, messages and gradients: the table that `replay` and `check` follow.

A new instruction needs one entry here and no change in the checker.
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
    """A named place for tensors of one micro-batch or of a whole batch, in each pipeline buffer or once per rank.

    Its content is needed until each kind of instruction in the rank's stream that reads the slot has read it. In a
    slot for a whole batch an instruction on a buffer reads or writes the part of that buffer's micro-batch, and a
    transfer takes all parts of a batch. A posted receive may write at any time: its slot must be free when it is
    posted, and may be read when it has been awaited.

    Attributes:
        name: key of the engine's `pipe_buffers`, or the attribute that holds it.
        where: stages that have it.
        per_rank: True if the engine holds one for all buffers, as DeepSpeed does for `loss` and `grad_layer`.
        whole_batch: True if it holds all micro-batches of a batch, once per rank.
    """

    name: str
    where: Where = Where.ALL
    per_rank: bool = False
    whole_batch: bool = False


@dataclass(frozen=True)
class Message:
    """A tensor that goes to a neighbour; a send and its receive carry the same Message.

    Attributes:
        name: what travels.
        to: +1 for the next stage, -1 for the one before.
        blocking: True if the send ends only when the receive is reached, as DeepSpeed's `p2p.send` may; False
            if both are only started, and each is awaited by another instruction of its rank. A started send has left
            when its receive is posted, not before: the worst case.
        ticks: ticks that it may travel. Both its ends start in one tick and are awaited that many ticks later, and
            its sender treats a batch that many ticks before its receiver.
        group: messages of one group between two stages arrive in the order in which they were sent.
    """

    name: str
    to: int
    blocking: bool = True
    ticks: int = 0
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
class Gradients:
    """Gradients of one kind: added up over a batch, reduced, used by one optimizer step.

    Attributes:
        name: whose they are.
        replicated: True if every rank has a copy of these weights: all copies step together in every tick, and a
            rank without a batch gives zeros to the sum. False if they are the stage's own, with one step a batch.
    """

    name: str
    replicated: bool = False


@dataclass(frozen=True)
class Effect:
    """Everything the checker knows about an instruction.

    Attributes:
        code: short name in grids.
        reads: slots that must hold the same micro-batch.
        writes: slots that receive it; what they held must not be needed any more.
        frees: slots that it empties; what they held must not be needed any more.
        loads: True if it takes the next micro-batch of the rank's data iterator.
        sends: message that leaves, with what is read.
        receives: message that arrives in what is written; if it doesn't block, it may arrive from now on.
        awaits_send: message whose started send ends here; what is read has left.
        awaits_receive: message whose posted receive ends here; what is written has arrived.
        collective: collective over all stages that it issues.
        waits: name of a started collective that it waits for.
        owes: gradients that a later instruction must add for this micro-batch, if the schedule trains.
        adds: gradients that it adds to.
        reduces: gradients that it makes final: nothing of this batch may be owed, or added after it.
        steps: gradients that it uses up; they must be final, and no backward pass may be owed.
        once: True if every stage does it exactly once per micro-batch.
    """

    code: str
    reads: tuple[Slot, ...] = ()
    writes: tuple[Slot, ...] = ()
    frees: tuple[Slot, ...] = ()
    loads: bool = False
    sends: Message | None = None
    receives: Message | None = None
    awaits_send: Message | None = None
    awaits_receive: Message | None = None
    collective: Collective | None = None
    waits: str | None = None
    owes: Gradients | None = None
    adds: Gradients | None = None
    reduces: Gradients | None = None
    steps: Gradients | None = None
    once: bool = False


_ACTIVATION = Message("activation", to=+1)
_GRADIENT = Message("gradient", to=-1)
_VARIABLE = Message("variable", to=-1, blocking=False, ticks=1, group="variables")
_OUTPUT = Message("output", to=+1, blocking=False, ticks=1, group="outputs")
_AUX_SUM = Collective("aux_sum", blocking=False)

_WEIGHTS, _AUX_NET = Gradients("weights"), Gradients("aux_net", replicated=True)

_INPUTS, _OUTPUTS, _LABELS = Slot("inputs"), Slot("outputs"), Slot("labels", Where.LAST)
_INPUT_GRAD = Slot("inputs.grad", Where.NOT_FIRST)
_GRAD_LAYER = Slot("grad_layer", Where.NOT_LAST, per_rank=True)
_PIPE_LOSS, _LOCAL_LOSS = Slot("loss", Where.LAST, per_rank=True), Slot("loss", per_rank=True)
_BATCH, _VARIABLES, _STAGE_INPUTS = Slot("batch"), Slot("variables"), Slot("stage_inputs")
_BATCH_LABELS, _STAGE_INPUT_GRAD = Slot("batch", Where.LAST), Slot("stage_inputs.grad", Where.NOT_FIRST)
_MESSAGE = Slot("message", Where.NOT_FIRST, whole_batch=True)
_RECEIVED = Slot("received", Where.NOT_LAST, whole_batch=True)
_OWN_OUTPUTS = Slot("message", Where.NOT_LAST, whole_batch=True)
_RECEIVED_OUTPUTS = Slot("received", Where.NOT_FIRST, whole_batch=True)

EFFECTS: Mapping[type[ins.PipeInstruction], Effect] = MappingProxyType(
    {
        # DeepSpeed's 1F1B and inference
        ins.LoadMicroBatch: Effect("L", writes=(Slot("inputs", Where.FIRST), _LABELS), loads=True),
        ins.ForwardPass: Effect("F", reads=(_INPUTS, _LABELS), writes=(_OUTPUTS, _PIPE_LOSS), owes=_WEIGHTS, once=True),
        ins.BackwardPass: Effect(
            "B", reads=(_OUTPUTS, _GRAD_LAYER, _PIPE_LOSS), writes=(_INPUT_GRAD,), adds=_WEIGHTS, once=True
        ),
        ins.SendActivation: Effect("sA", reads=(_OUTPUTS,), sends=_ACTIVATION),
        ins.RecvActivation: Effect("rA", writes=(_INPUTS,), receives=_ACTIVATION),
        ins.SendGrad: Effect("sG", reads=(_INPUTS, _INPUT_GRAD), sends=_GRADIENT),
        ins.RecvGrad: Effect("rG", reads=(_OUTPUTS,), writes=(_GRAD_LAYER,), receives=_GRADIENT),
        ins.ReduceTiedGrads: Effect("RT", collective=Collective("tied_gradients")),
        ins.ReduceGrads: Effect("R", reduces=_WEIGHTS),
        ins.OptimizerStep: Effect("S", steps=_WEIGHTS),
        # a local step
        ins.LoadReplicaBatch: Effect("L", writes=(_BATCH,), loads=True),
        ins.AuxForward: Effect("aF", reads=(_BATCH,), writes=(_VARIABLES,), owes=_AUX_NET, once=True),
        ins.LocalForward: Effect(
            "F", reads=(_BATCH, _VARIABLES), writes=(_STAGE_INPUTS, _OUTPUTS), owes=_WEIGHTS, once=True
        ),
        ins.LocalBackward: Effect(
            "B", reads=(_STAGE_INPUTS, _LOCAL_LOSS), writes=(_STAGE_INPUT_GRAD,), adds=_WEIGHTS, once=True
        ),
        ins.AuxBackward: Effect(
            "aB",
            reads=(_VARIABLES, _OUTPUTS, _STAGE_INPUT_GRAD),
            frees=(_BATCH, _VARIABLES, _STAGE_INPUTS, _OUTPUTS, _STAGE_INPUT_GRAD),
            adds=_AUX_NET,
            once=True,
        ),
        ins.ReduceAuxGrads: Effect("aR", collective=_AUX_SUM, reduces=_AUX_NET),
        ins.AuxOptimizerStep: Effect("aS", waits="aux_sum", steps=_AUX_NET),
        # its loss, and what the augmented Lagrangian method sends
        ins.PenaltyLoss: Effect("pL", reads=(_OUTPUTS, _VARIABLES, _BATCH_LABELS), writes=(_LOCAL_LOSS,), once=True),
        ins.LagrangianLoss: Effect("lL", reads=(_OUTPUTS, _RECEIVED, _BATCH_LABELS), writes=(_LOCAL_LOSS,), once=True),
        ins.RefreshVariable: Effect("V", reads=(_VARIABLES, _STAGE_INPUT_GRAD), writes=(_MESSAGE,)),
        ins.SendVariable: Effect("sV", reads=(_MESSAGE,), sends=_VARIABLE),
        ins.WaitSendVariable: Effect("wS", reads=(_MESSAGE,), awaits_send=_VARIABLE),
        ins.RecvVariable: Effect("rV", writes=(_RECEIVED,), receives=_VARIABLE),
        ins.WaitRecvVariable: Effect("wR", writes=(_RECEIVED,), awaits_receive=_VARIABLE),
        # a tick of greedy local losses
        ins.ReceivedForward: Effect(
            "F", reads=(_BATCH, _RECEIVED_OUTPUTS), writes=(_STAGE_INPUTS, _OUTPUTS), owes=_WEIGHTS, once=True
        ),
        ins.HeadLoss: Effect("hL", reads=(_OUTPUTS, _BATCH), writes=(_LOCAL_LOSS,), once=True),
        ins.HeadBackward: Effect(
            "B",
            reads=(_STAGE_INPUTS, _LOCAL_LOSS),
            frees=(_BATCH, _STAGE_INPUTS, _OUTPUTS),
            adds=_WEIGHTS,
            once=True,
        ),
        ins.WriteOutput: Effect("X", reads=(_OUTPUTS,), writes=(_OWN_OUTPUTS,)),
        ins.SendOutput: Effect("sX", reads=(_OWN_OUTPUTS,), sends=_OUTPUT),
        ins.WaitSendOutput: Effect("wS", reads=(_OWN_OUTPUTS,), awaits_send=_OUTPUT),
        ins.RecvOutput: Effect("rX", writes=(_RECEIVED_OUTPUTS,), receives=_OUTPUT),
        ins.WaitRecvOutput: Effect("wR", writes=(_RECEIVED_OUTPUTS,), awaits_receive=_OUTPUT),
    }
)
"""Effects of DeepSpeed's instructions and of ours. `ReduceTiedGrads` counts as a collective of all stages,
the worst case that its docstring names; `ReduceGrads` and `OptimizerStep` act among a stage's replicas."""
