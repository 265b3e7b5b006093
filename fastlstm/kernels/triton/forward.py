"""Forward: the choice between a sequence in one program and units spread over programs."""

from __future__ import annotations

from fastlstm.kernels.operators import zero
from fastlstm.spec import Outputs

from .call import Call
from .config import forward_plan
from .forward_sequence import launch_lstm_fwd_sequence
from .forward_steps import launch_lstm_fwd_steps

__all__ = ["launch_lstm_fwd"]


def launch_lstm_fwd(call: Call, outputs: Outputs) -> None:
    """Write the outputs of one layer of an LSTM.

    The sequence regime writes no gates: ``keeps_gates`` of the backend says where they are kept.
    Registers and clusters keep them by unit, ``[D, rows, H, 4]``, the steps regime by gate.
    """
    plan = forward_plan(call.problem, call.device)
    if call.rows.padded:
        zero(outputs.y, outputs.c_all)
    if plan.regime == "registers":
        from .forward_registers import launch_lstm_fwd_registers  # an older Triton has no Gluon

        launch_lstm_fwd_registers(call, plan, outputs)
    elif plan.regime == "cluster":
        from .forward_cluster import launch_lstm_fwd_cluster

        launch_lstm_fwd_cluster(call, plan, outputs)
    elif plan.regime == "sequence":
        launch_lstm_fwd_sequence(call, plan, outputs)
    else:
        launch_lstm_fwd_steps(call, plan, outputs)
