"""A forecaster that is trained here and runs in ONNX Runtime, at sizes it was not exported with.

The model reads waves and says the next value after every step. ``torch.onnx.export`` is told that
the number of sequences and of steps may change; each layer becomes one LSTM node of ONNX.

Prints the error before and after training, the LSTM nodes of the exported model, and how far
ONNX Runtime is from PyTorch at several sizes: rounding, at most. Needs the packages onnx,
onnxscript and onnxruntime.

    python -m benchmarks.examples.export_onnx --steps 100
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

import onnxruntime
import torch
from torch import Tensor, nn

import fastlstm

SIZES = ((1, 1), (1, 50), (7, 13), (32, 100))  # batch B and steps T to run with


class Forecaster(nn.Module):
    """Values [B, T, 1] to the value after each of them, [B, T, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastlstm.LSTM(1, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.head(y)


def waves(sequences: int, steps: int) -> Tensor:
    """Sums of two sines of random frequency and phase, [B, T, 1]."""
    t = torch.arange(steps)
    frequency, phase = 0.1 + 0.4 * torch.rand(sequences, 2, 1), 6.3 * torch.rand(sequences, 2, 1)
    return torch.sin(frequency * t + phase).mean(1)[..., None]


def error(model: nn.Module, x: Tensor) -> Tensor:
    """The mean squared error of the forecasts."""
    return nn.functional.mse_loss(model(x[:, :-1]), x[:, 1:])


def to_onnx_runtime(model: nn.Module) -> tuple[onnxruntime.InferenceSession, int]:
    """The model in ONNX Runtime, and how many LSTM nodes it has there."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses packages nobody needs here
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    program = torch.onnx.export(
        model.eval(),
        (waves(2, 8),),  # an example: neither of its sizes is fixed
        dynamic_shapes=({0: B, 1: T},),
        input_names=["x"],
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto  # program.save("model.onnx") writes it to a file
    nodes = sum(node.op_type == "LSTM" for node in proto.graph.node)
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=providers), nodes


def main(argv: Sequence[str] | None = None) -> tuple[float, float, int, float]:
    """Trains and exports; returns both errors, the LSTM nodes and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of training (default: 100)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model, unseen = Forecaster(), waves(200, 60)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.no_grad():
        before = error(model, unseen).item()
    for _ in range(args.steps):
        loss = error(model, waves(32, 60))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = error(model, unseen).item()
    print(f"squared error of the forecasts: {before:.5f} before training, {after:.5f} after it")

    session, nodes = to_onnx_runtime(model)
    print(f"exported: {nodes} LSTM nodes for {model.lstm.num_layers} layers")
    largest = 0.0
    for B, T in SIZES:
        x = waves(B, T)
        (found,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            difference = (torch.from_numpy(found) - model(x)).abs().max().item()
        print(f"B = {B:2}, T = {T:3}: PyTorch and ONNX Runtime differ by {difference:.1e} at most")
        largest = max(largest, difference)
    return before, after, nodes, largest


if __name__ == "__main__":
    main()
