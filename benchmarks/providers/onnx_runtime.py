"""ONNX Runtime: nn.LSTM's weights in one LSTM node a layer, for inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..speed.contender import Contender
from ..speed.workload import Workload
from . import Provider
from .pytorch import refuses_step

OPSET, IR_VERSION = 17, 8  # old enough for every release of ONNX Runtime that runs on Python 3.10


class OnnxRuntime(Provider):
    """On the CPU; on a GPU where the package for GPUs is installed."""

    name, label = "onnxruntime", "ONNX Runtime"
    packages = ("onnxruntime", "onnx")

    def refuses(self, work: Workload) -> str | None:
        if work.mode == "train":
            return "forward only"
        if work.dtype != torch.float32:
            return "float32 only here"
        if work.reset is not None:
            return "no resets"
        if not work.on_cpu and "CUDAExecutionProvider" not in _providers():
            return "onnxruntime-gpu not installed"
        return refuses_step(work)

    def contender(self, work: Workload) -> Contender:
        runtime = session(work, self.model(work))
        if not work.on_cpu:
            return _on_gpu(runtime, work)
        start = {name: value.numpy() for name, value in inputs(work).items()}
        feed = dict(start)
        states = [name for name in start if name[0] in "hc"]

        def results() -> dict[str, Tensor]:
            return outputs([torch.from_numpy(a) for a in runtime.run(None, start)])

        def step() -> None:
            _, *carried = runtime.run(None, feed)
            feed.update(zip(states, carried, strict=True))

        def infer() -> object:
            return runtime.run(None, start)

        # Its arena keeps what it has, so that a later call shows nothing of its memory.
        return Contender(step if work.mode == "step" else infer, results, peak=lambda: None)

    def model(self, work: Workload) -> bytes:
        """Return the ONNX model: the inputs of `inputs`, the outputs of `outputs`."""
        return model(work)


def _providers() -> list[str]:
    import onnxruntime

    available: list[str] = onnxruntime.get_available_providers()
    return available


def inputs(work: Workload) -> dict[str, Tensor]:
    """x [T, B, I], int32 lengths [B] of a ragged case, and h0_k and c0_k [D, B, H] of layer k."""
    case = work.case
    zeros = torch.zeros(case.L * case.D, case.B, case.H, device=work.x.device)
    found = {"x": work.x}
    if work.lengths is not None:
        found["lengths"] = work.lengths.int().to(work.x.device)
    h0, c0 = (state.split(case.D) for state in work.state or (zeros, zeros))
    for k in range(case.L):
        found |= {f"h0_{k}": h0[k], f"c0_{k}": c0[k]}
    return found


def outputs(found: list[Tensor]) -> dict[str, Tensor]:
    """y [T, D, B, H], as the last node leaves it, and h_k and c_k [D, B, H], in nn.LSTM's form."""
    y, *states = found
    y = y.transpose(1, 2).flatten(2)
    return {"y": y, "h": torch.cat(states[::2]), "c": torch.cat(states[1::2])}


def _on_gpu(runtime: Any, work: Workload) -> Contender:
    """Inputs and outputs stay on the GPU. Synchronous: a call ends when the GPU has."""
    index = work.x.device.index or 0
    binding = runtime.io_binding()
    given = inputs(work)

    def bind(name: str, value: Tensor) -> None:
        kind = np.int32 if value.dtype == torch.int32 else np.float32
        place = (name, "cuda", index, kind, tuple(value.shape), value.data_ptr())
        binding.bind_input(*place)

    kept = {name: value.contiguous() for name, value in given.items()}
    for name, value in kept.items():
        bind(name, value)
    case = work.case
    made = [torch.empty(len(work.x), case.D, case.B, case.H, device=work.x.device)]
    made += [torch.empty_like(kept[name]) for name in kept if name[0] in "hc"]
    for node, value in zip(runtime.get_outputs(), made, strict=True):
        place = (node.name, "cuda", index, np.float32, tuple(value.shape), value.data_ptr())
        binding.bind_output(*place)

    def call() -> None:
        runtime.run_with_iobinding(binding)

    def step() -> None:
        call()
        for name, value in zip([n for n in kept if n[0] in "hc"], made[1:], strict=True):
            kept[name].copy_(value)

    def results() -> dict[str, Tensor]:
        for name, value in inputs(work).items():
            kept[name].copy_(value)
        call()
        return outputs([value.clone() for value in made])

    return Contender(step if work.mode == "step" else call, results)


def session(work: Workload, made: bytes) -> Any:
    """An onnxruntime.InferenceSession of the model `made`, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its idle threads must not keep a core busy while the other contenders have their turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    cuda = ("CUDAExecutionProvider", {"device_id": work.x.device.index or 0})
    providers = ["CPUExecutionProvider"] if work.on_cpu else [cuda]
    return onnxruntime.InferenceSession(made, options, providers=providers)


def model(work: Workload) -> bytes:
    """The ONNX model: the inputs of `inputs`, the outputs of `outputs`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, shape: tuple[int, ...], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    case, T = work.case, len(work.x)
    D, B, H = case.D, case.B, case.H
    given = [
        value(name, tuple(v.shape), TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT)
        for name, v in inputs(work).items()
    ]
    lengths = "lengths" if work.lengths is not None else ""
    nodes, made = [], [value("y", (T, D, B, H))]
    constants = {}
    rows = "x"
    for k in range(case.L):
        constants |= {f"{name}_{k}": array for name, array in _weights(work.lstm, k).items()}
        made += [value(f"{name}_{k}", (D, B, H)) for name in "hc"]
        y = "y" if k == case.L - 1 else f"y_{k}"
        nodes.append(
            helper.make_node(
                "LSTM",
                [rows, f"W_{k}", f"R_{k}", f"B_{k}", lengths, f"h0_{k}", f"c0_{k}"],
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
    graph = helper.make_graph(nodes, "lstm", given, made, initializers)
    made_of = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    made_of.ir_version = IR_VERSION
    onnx.checker.check_model(made_of)
    serialized: bytes = made_of.SerializeToString()
    return serialized


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
    i, f, g, o = np.split(parameter.detach().cpu().numpy(), 4)
    return np.concatenate([i, o, f, g])
