"""The instructions a schedule is made of: DeepSpeed's own, and those of a local step.

Schedules yield them, `dsaux.engine` maps each to a method, `dsaux.schedules.check` replays them. In the
"Roughly" blocks this is stage ``k`` of ``K``: it takes ``lambda_k`` and makes ``X_(k+1)``; symbols in
`dsaux.objective`.
"""

from __future__ import annotations

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    BufferOpInstruction,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
)

__all__ = [
    "AuxBackward",
    "AuxForward",
    "AuxOptimizerStep",
    "BackwardPass",
    "BufferOpInstruction",
    "ForwardPass",
    "HeadBackward",
    "HeadLoss",
    "LagrangianLoss",
    "LoadMicroBatch",
    "LoadReplicaBatch",
    "LocalBackward",
    "LocalForward",
    "OptimizerStep",
    "PenaltyLoss",
    "PipeInstruction",
    "ReceivedForward",
    "RecvActivation",
    "RecvGrad",
    "RecvOutput",
    "RecvVariable",
    "ReduceAuxGrads",
    "ReduceGrads",
    "ReduceTiedGrads",
    "RefreshVariable",
    "SendActivation",
    "SendGrad",
    "SendOutput",
    "SendVariable",
    "WaitRecvOutput",
    "WaitRecvVariable",
    "WaitSendOutput",
    "WaitSendVariable",
    "WriteOutput",
]


class LoadReplicaBatch(BufferOpInstruction):  # type: ignore[misc]
    """Load a micro-batch, inputs and labels, into a buffer.

    Roughly:

    .. code-block:: python

        buffers["inputs"][buffer_id], buffers["labels"][buffer_id] = next(data_iter)

    Pairs with the same instruction on every other stage of the replica: all of them read the same batch.
    (DeepSpeed's ``LoadMicroBatch`` runs on the first and the last stage only.)
    """


class AuxForward(BufferOpInstruction):  # type: ignore[misc]
    """Run the AuxNet from the batch to this stage's own input and, below the last stage, one boundary on.

    Roughly:

    .. code-block:: python

        buffers["variables"][buffer_id] = aux_net(buffers["inputs"][buffer_id], depth=min(k + 1, K - 1))

    Pairs with :class:`AuxBackward` on the same buffer. Nothing is received: every rank has an AuxNet replica.
    """


class LocalForward(BufferOpInstruction):  # type: ignore[misc]
    """Run this stage forward on its auxiliary variable.

    Roughly:

    .. code-block:: python

        X = stage(variables[k])

    Pairs with the loss behind it (:class:`PenaltyLoss` or :class:`LagrangianLoss`) and with :class:`LocalBackward` on
    the same buffer; needs :class:`AuxForward` before it.
    """


class PenaltyLoss(BufferOpInstruction):  # type: ignore[misc]
    """Local loss of the penalty method: the stage is to make what its own AuxNet replica gives the next stage.

    Roughly:

    .. code-block:: python

        loss = cross_entropy(X, labels) if k == K - 1 else coupling_loss(X, variables[k + 1])

    Pairs with :class:`LocalBackward` on the same buffer; needs :class:`LocalForward` before it. Nothing is received.
    """


class LagrangianLoss(BufferOpInstruction):  # type: ignore[misc]
    """Local loss of the augmented Lagrangian method: the stage is to make the refreshed variable of the next stage.

    Roughly:

    .. code-block:: python

        loss = cross_entropy(X, labels) if k == K - 1 else coupling_loss(X, received[micro_batch])

    Pairs with :class:`LocalBackward` on the same buffer; needs :class:`LocalForward` before it and, below the last
    stage, the :class:`WaitRecvVariable` of this batch.
    """


class LocalBackward(BufferOpInstruction):  # type: ignore[misc]
    """Run this stage backward from its local loss; weight gradients add up, ``g_k`` stays in the buffer.

    Roughly:

    .. code-block:: python

        engine.backward(loss)
        g_k = variables[k].grad

    Pairs with :class:`LocalForward`. No gradient comes from the stage above or goes to the one below.
    """


class AuxBackward(BufferOpInstruction):  # type: ignore[misc]
    """Push this rank's forces back through the AuxNet in one backward pass, then free the buffer.

    Roughly:

    .. code-block:: python

        forces = [gamma * g_k, match_force(variables[k + 1], X)]
        torch.autograd.backward([variables[k], variables[k + 1]], forces)

    Pairs with :class:`AuxForward`; needs :class:`LocalBackward` before it.
    """


class ReduceAuxGrads(PipeInstruction):  # type: ignore[misc]
    """Start the sum of the AuxNet's gradients over all ranks, and go on without waiting.

    Roughly:

    .. code-block:: python

        work = all_reduce(aux_gradients, async_op=True)

    Pairs with :class:`AuxOptimizerStep` on the same rank, which waits for ``work``, and with the same
    instruction on every other rank: it is a collective of all ranks, a rank with nothing to add gives zeros. Under
    greedy local losses there is no AuxNet: loss, flags and batch digests, which ride along, are all of the sum.
    """


class AuxOptimizerStep(PipeInstruction):  # type: ignore[misc]
    """Wait for the AuxNet's gradient sum and step the AuxNet; the replicas stay equal bit by bit.

    Roughly:

    .. code-block:: python

        work.wait()
        aux_optimizer.step()

    Pairs with :class:`ReduceAuxGrads`, which started the sum.
    """


class RefreshVariable(BufferOpInstruction):  # type: ignore[misc]
    """Write the refreshed variable of one micro-batch into the message to the stage before.

    Roughly:

    .. code-block:: python

        message[micro_batch] = lambda_k - (D v / beta) * B * g_k

    Pairs with :class:`SendVariable` on the same rank, which sends the message when all micro-batches are in it; needs
    :class:`LocalBackward` before it, and :class:`WaitSendVariable` before the first one of a batch.
    """


class SendVariable(PipeInstruction):  # type: ignore[misc]
    """Start to send the refreshed variables of a batch to stage ``k - 1``, and go on without waiting.

    Roughly:

    .. code-block:: python

        sending = isend(message, to=k - 1)

    Pairs with :class:`RecvVariable` on stage ``k - 1`` in the same tick, and with :class:`WaitSendVariable` on this
    rank before the message is written again.
    """


class WaitSendVariable(PipeInstruction):  # type: ignore[misc]
    """Wait until the message of the batch before has left, so that it may be written again.

    Roughly:

    .. code-block:: python

        sending.wait()

    Pairs with the :class:`SendVariable` of the tick before on the same rank.
    """


class RecvVariable(PipeInstruction):  # type: ignore[misc]
    """Post the receive of the refreshed variables that stage ``k + 1`` makes in this tick; they are used in the next.

    Roughly:

    .. code-block:: python

        receiving = irecv(received, from=k + 1)

    Pairs with :class:`SendVariable` on stage ``k + 1`` in the same tick, and with :class:`WaitRecvVariable` on this
    rank in the next.
    """


class WaitRecvVariable(PipeInstruction):  # type: ignore[misc]
    """Wait for the refreshed variables of this tick's batch.

    Roughly:

    .. code-block:: python

        receiving.wait()

    Pairs with the :class:`RecvVariable` of the tick before on the same rank.
    """


class ReceivedForward(BufferOpInstruction):  # type: ignore[misc]
    """Run this stage forward on what the stage before has really made of the batch; no gradient goes back there.

    Roughly:

    .. code-block:: python

        X_(k+1) = stage(inputs if k == 0 else received[micro_batch].detach())

    Pairs with :class:`HeadLoss` and :class:`HeadBackward` on the same buffer; needs, behind the first stage, the
    :class:`WaitRecvOutput` of this batch.
    """


class HeadLoss(BufferOpInstruction):  # type: ignore[misc]
    """Local loss of greedy training: the task's, behind a small head of this stage; the last stage has the network's.

    Roughly:

    .. code-block:: python

        loss = loss_fn(X if k == K - 1 else head(X), labels)

    Pairs with :class:`HeadBackward` on the same buffer; needs :class:`ReceivedForward` before it. Nothing is received.
    """


class HeadBackward(BufferOpInstruction):  # type: ignore[misc]
    """Run head and stage backward from the local loss, down to the stage's own input, then free the buffer.

    Roughly:

    .. code-block:: python

        engine.backward(loss)

    Pairs with :class:`ReceivedForward`. No gradient comes from the stage above or goes to the one below.
    """


class WriteOutput(BufferOpInstruction):  # type: ignore[misc]
    """Write what this stage has made of one micro-batch into the message to the next stage.

    Roughly:

    .. code-block:: python

        message[micro_batch] = X_(k+1).detach()

    Pairs with :class:`SendOutput` on the same rank, which sends the message when all micro-batches are in it; needs
    :class:`ReceivedForward` before it, and :class:`WaitSendOutput` before the first one of a batch.
    """


class SendOutput(PipeInstruction):  # type: ignore[misc]
    """Start to send what this stage has made of a batch to stage ``k + 1``, and go on without waiting.

    Roughly:

    .. code-block:: python

        sending = isend(message, to=k + 1)

    Pairs with :class:`RecvOutput` on stage ``k + 1`` in the same tick, and with :class:`WaitSendOutput` on this rank
    before the message is written again.
    """


class WaitSendOutput(PipeInstruction):  # type: ignore[misc]
    """Wait until the message of the batch before has left, so that it may be written again.

    Roughly:

    .. code-block:: python

        sending.wait()

    Pairs with the :class:`SendOutput` of the tick before on the same rank.
    """


class RecvOutput(PipeInstruction):  # type: ignore[misc]
    """Post the receive of what stage ``k - 1`` makes in this tick; it is used in the next.

    Roughly:

    .. code-block:: python

        receiving = irecv(received, from=k - 1)

    Pairs with :class:`SendOutput` on stage ``k - 1`` in the same tick, and with :class:`WaitRecvOutput` on this rank
    in the next.
    """


class WaitRecvOutput(PipeInstruction):  # type: ignore[misc]
    """Wait for what the stage before has made of this tick's batch.

    Roughly:

    .. code-block:: python

        receiving.wait()

    Pairs with the :class:`RecvOutput` of the tick before on the same rank.
    """
