"""An nn.LSTM as an ONNX Runtime session: the peer of `speed` for inference."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET, IR_VERSION = 17, 8  # old enough for every release of ONNX Runtime that runs on Python 3.10


def session(lstm: nn.LSTM, T: int, B: int, threads: int) -> onnxruntime.InferenceSession:
    """Inputs x [T, B, I] and, for layer k, h0_k and c0_k [D, B, H].

    Outputs y [T, D, B, H], as the last LSTM node leaves it, and h_k and c_k [D, B, H].
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its idle threads must not keep a core busy while the other contenders have their turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = _model(lstm, T, B).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(lstm: nn.LSTM, T: int, B: int) -> onnx.ModelProto:
    D, H = 1 + lstm.bidirectional, lstm.hidden_size
    nodes = []
    constants = {}
    inputs = [_value("x", T, B, lstm.input_size)]
    outputs = [_value("y", T, D, B, H)]
    rows = "x"
    for k in range(lstm.num_layers):
        constants |= {f"{name}_{k}": array for name, array in _weights(lstm, k).items()}
        inputs += [_value(f"h0_{k}", D, B, H), _value(f"c0_{k}", D, B, H)]
        outputs += [_value(f"h_{k}", D, B, H), _value(f"c_{k}", D, B, H)]
        y = "y" if k == lstm.num_layers - 1 else f"y_{k}"
        nodes.append(
            helper.make_node(
                "LSTM",
                [rows, f"W_{k}", f"R_{k}", f"B_{k}", "", f"h0_{k}", f"c0_{k}"],
                [y, f"h_{k}", f"c_{k}"],
                hidden_size=H,
                direction="bidirectional" if D == 2 else "forward",
            )
        )
        if y != "y":  # to the [T, B, D*H] that the next layer reads
            rows = f"rows_{k}"
            constants["merged"] = np.array([T, B, D * H], dtype=np.int64)
            nodes += [
                helper.make_node("Transpose", [y], [f"swapped_{k}"], perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"swapped_{k}", "merged"], [rows]),
            ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "lstm", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return model


def _value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _weights(lstm: nn.LSTM, layer: int) -> dict[str, np.ndarray]:
    """ONNX's W [D, 4H, I], R [D, 4H, H] and B [D, 8H] of one layer."""
    stacks: dict[str, list[np.ndarray]] = {"W": [], "R": [], "B": []}
    for suffix in ("", "_reverse")[: 1 + lstm.bidirectional]:
        w_ih, w_hh, b_ih, b_hh = (
            _reorder(getattr(lstm, f"{name}_l{layer}{suffix}"))
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        stacks["W"].append(w_ih)
        stacks["R"].append(w_hh)
        stacks["B"].append(np.concatenate([b_ih, b_hh]))
    return {name: np.stack(arrays) for name, arrays in stacks.items()}


def _reorder(parameter: Tensor) -> np.ndarray:
    """Gates i, f, g, o of PyTorch -> i, o, f, g (ONNX calls g "c")."""
    i, f, g, o = np.split(parameter.detach().numpy(), 4)
    return np.concatenate([i, o, f, g])
