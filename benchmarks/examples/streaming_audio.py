"""Audio that is processed frame by frame, as it arrives, with the state carried along.

A network hears 10 ms at a time: 40 energies of a frame go through a stack of LSTM layers, and its
state goes into the next call. The same weights run in fastlstm.LSTM and in torch.nn.LSTM.

Prints the time of a frame for both, median and 99th percentile, the share of the 10 ms that it
takes, and how far the stream is from one call for the whole recording: rounding, at most.

    python -m benchmarks.examples.streaming_audio --frames 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor, nn

import fastlstm

RATE = 16_000  # samples a second
FRAME = 160  # samples, 10 ms
BANDS = 40


class Listener(nn.Module):
    """Energies [T, B, 40] to the probability that somebody speaks, [T, B]."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(128, 1)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple:
        y, hx = self.lstm(x, hx)
        return self.head(y).sigmoid()[..., 0], hx


def recording(frames: int) -> Tensor:
    """Samples [frames, 160]: a voice of a few tones that comes and goes, in noise."""
    t = torch.arange(frames * FRAME) / RATE
    tones = sum(torch.sin(2 * torch.pi * f * t) / f for f in (140, 280, 420, 1300, 2500)) * 100
    speaks = (torch.sin(2 * torch.pi * 0.7 * t) > 0).float()
    return (tones * speaks + 0.05 * torch.randn(len(t))).view(frames, FRAME)


def energies(frame: Tensor) -> Tensor:
    """The logarithms of 40 energies of each frame [..., 160]: [..., 40]."""
    spectrum = torch.fft.rfft(frame).abs().square()[..., 1:]  # 80 bands of 100 Hz
    return (spectrum.unflatten(-1, (BANDS, 2)).sum(-1) + 1e-6).log()


def percentile(seconds: list[float], share: float) -> float:
    """In microseconds."""
    return 1e6 * torch.tensor(seconds).quantile(share).item()


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> float:
    """Streams a recording through both; returns how far ours is from one call for all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000, help="10 ms each (default: 1000)")
    parser.add_argument("--layers", type=int, default=2, help="of the LSTM (default: 2)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    theirs = Listener(nn.LSTM(BANDS, 128, args.layers)).eval()
    ours = Listener(fastlstm.LSTM.from_torch(theirs.lstm)).eval()
    ours.head = theirs.head
    models = {"fastlstm.LSTM": ours, "torch.nn.LSTM": theirs}
    states: dict[str, tuple[Tensor, Tensor] | None] = dict.fromkeys(models)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    heard: dict[str, list[Tensor]] = {name: [] for name in models}

    audio = recording(args.frames)
    for frame in audio:  # as it comes from a microphone
        x = energies(frame)[None, None]  # one step of one sequence
        for name, model in models.items():
            start = perf_counter()
            probability, states[name] = model(x, states[name])
            seconds[name].append(perf_counter() - start)
            heard[name].append(probability[0])

    for name, times in seconds.items():
        median = percentile(times, 0.5)
        print(
            f"{name}: {median:6.1f} µs a frame (99th percentile {percentile(times, 0.99):.1f}), "
            f"{median / 1e4:.2%} of real time"
        )
    whole, _ = ours(energies(audio)[:, None])
    difference = (torch.stack(heard["fastlstm.LSTM"]) - whole).abs().max().item()
    print(f"the stream and one call for {args.frames} frames differ by {difference:.1e} at most")
    return difference


if __name__ == "__main__":
    main()
