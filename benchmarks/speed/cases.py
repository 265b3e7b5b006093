"""The shapes that are timed: the tasks' own, those of typical users, and any ``I,H,L,D,B,T``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESET_EVERY = 32  # steps of an episode, on average


@dataclass(frozen=True)
class Case:
    """One shape: input size, hidden size, layers, directions, batch, time steps.

    `packed` mixes sequences of all lengths up to T. `reset` restarts rows inside the sequence, as
    RL episodes do. `who` says in words what it stands for.
    """

    name: str
    I: int
    H: int
    L: int
    D: int
    B: int
    T: int
    packed: bool = False
    reset: bool = False
    group: str = ""
    who: str = ""

    @property
    def shape(self) -> str:
        """As ``--case`` takes it."""
        return ",".join(str(n) for n in (self.I, self.H, self.L, self.D, self.B, self.T))

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: every sequence's steps; a packed batch mixes all lengths from 1 to T."""
        if not self.packed:
            return torch.full((self.B,), self.T)
        mixed = torch.linspace(1, self.T, self.B).round().long()
        return mixed[torch.randperm(self.B, generator=torch.Generator().manual_seed(0))]

    def x(self) -> Tensor:
        """float32 [T, B, I], the same numbers at every call, zero past the lengths."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.T, self.B, self.I, generator=generator)
        if self.packed:
            x *= torch.arange(self.T)[:, None, None] < self.lengths[:, None]
        return x

    def starts(self) -> Tensor:
        """bool [T, B], the same at every call: episodes end after RESET_EVERY steps on average."""
        generator = torch.Generator().manual_seed(3)
        return torch.rand(self.T, self.B, generator=generator) < 1 / RESET_EVERY


def _group(name: str, *cases: tuple[Any, ...]) -> list[Case]:
    made = []
    for title, numbers, who, *flags in cases:
        marks = dict.fromkeys(flags, True)
        made.append(Case(title, *numbers, **marks, group=name, who=who))
    return made


TASKS = _group(
    "tasks",
    ("binary", (10, 32, 2, 1, 512, 20), "binary increment: two layers over 20 bits"),
    ("mnist-lstm", (28, 64, 1, 1, 128, 28), "MNIST by rows"),
    ("mnist-lstm128", (28, 128, 1, 1, 128, 28), "MNIST by rows, twice as wide"),
    ("mnist-blstm", (28, 64, 1, 2, 256, 28), "MNIST by rows, read both ways"),
    ("hello", (5, 5, 1, 1, 1, 6), "a first LSTM of a tutorial: six letters"),
)
USERS = _group(
    "users",
    (
        "mnist-blstm-packed",
        (28, 64, 1, 2, 256, 28),
        "MNIST by rows, read both ways, packed",
        "packed",
    ),
    (
        "step",
        (64, 64, 1, 1, 1, 1),
        "one step of a stream (audio, sensors, keyboards)",
    ),
    ("one-sequence", (64, 64, 1, 1, 1, 28), "one request at a time"),
    ("rl-step", (64, 128, 1, 1, 16, 1), "RL: acting in 16 environments"),
    ("rl-rollout", (64, 128, 1, 1, 16, 128), "RL rollouts of 128 steps"),
    (
        "rl-resets",
        (64, 128, 1, 1, 16, 128),
        "RL rollouts with resets",
        "reset",
    ),
    ("forecaster", (8, 40, 1, 1, 256, 60), "many short time series"),
    ("speech", (80, 256, 3, 2, 16, 200), "a speech encoder: 80 filter banks, 2 s"),
    (
        "speech-ragged",
        (80, 256, 3, 2, 16, 400),
        "a speech encoder, packed utterances of up to 4 s",
        "packed",
    ),
    ("lm", (512, 512, 2, 1, 32, 64), "a language model"),
    ("large", (1024, 1024, 1, 1, 64, 32), "one wide layer of 1,024 units"),
)
# What runs in production on CPUs: one stream at a time. Loops over a cell are in :mod:`.loops`.
SMALL = _group(
    "small",
    ("vad-step", (128, 128, 1, 1, 1, 1), "voice activity: one frame"),
    ("vad-sequence", (128, 128, 1, 1, 1, 512), "voice activity: a recording of 512 frames"),
    ("rnnt-step", (640, 640, 2, 1, 1, 1), "speech recognition: one step of an RNN-T predictor"),
)
# Layers whose weights do not fit L2 beside everything else: each step reads them from L3.
WIDE = _group(
    "wide",
    ("wide-256", (256, 256, 1, 1, 8, 40), "256 units, few sequences"),
    ("wide-512", (512, 512, 1, 1, 8, 40), "512 units, few sequences"),
    ("wide-512-16", (512, 512, 1, 1, 16, 40), "512 units, 16 sequences"),
    ("wide-512-64", (512, 512, 1, 1, 64, 24), "512 units, many sequences"),
    ("wide-lm", (512, 512, 2, 1, 8, 32), "a language model that serves 8 requests"),
    ("wide-speech", (80, 256, 3, 2, 16, 50), "a speech encoder, half a second"),
    ("wide-tagger", (300, 384, 1, 2, 24, 30), "a tagger over word vectors, both ways"),
    ("wide-1024", (1024, 1024, 1, 1, 32, 16), "1,024 units"),
)
STEPS = [
    Case(f"step I={I} H={H} L={L} B={B}", I, H, L, 1, B, 1, group="sweep-step")
    for B in (1, 4)
    for L in (1, 2)
    for I, H in (
        (64, 64), (128, 128), (40, 200), (256, 256), (512, 512), (640, 640), (1024, 1024),
        (2048, 2048),
    )
]  # fmt: skip
# Baidu's DeepBench, code/kernels/rnn_problems.h: all LSTMs of its lists for training and, with a
# batch of up to 4, for inference on servers.
DEEPBENCH = [
    Case(f"H={H} B={B}", H, H, 1, 1, B, T, group="deepbench", who="DeepBench")
    for H, batches, T in (
        (512, (1, 2, 4, 16, 32, 64, 128), 25),
        (1024, (1, 2, 4, 16, 32, 64, 128), 25),
        (2048, (1, 2, 4, 16, 32, 64, 128), 25),
        (4096, (16, 32, 64, 128), 25),
        (1536, (1, 2, 4, 8, 16, 32), 50),
        (256, (1, 2, 4, 16, 32, 64), 150),
    )
    for B in batches
]
# FlashRNN's speed_experiments have 768 units in all, in heads of 16 to 768; one head of 768 is an
# LSTM. Over the batch size, then over the sequence length.
FLASHRNN = [
    Case(f"FlashRNN B={B} T={T}", 768, 768, 1, 1, B, T, group="flashrnn", who="FlashRNN")
    for B, T in (
        *((B, 1024) for B in (2, 8, 16, 32, 64, 128, 256)),
        *((16, T) for T in (256, 512, 2048)),
    )
]


def _sweep(letter: str, values: tuple[int, ...], **fixed: int) -> list[Case]:
    """A scaling curve: one number of the shape grows, I is H, the others stay."""
    made = []
    for value in values:
        n = {"L": 1, "D": 1, **fixed, letter: value}
        name = f"{letter}={value}"
        made.append(
            Case(name, n["H"], n["H"], n["L"], n["D"], n["B"], n["T"], group=f"sweep-{letter}")
        )
    return made


SWEEPS = [
    *_sweep("T", (1, 4, 16, 64, 256, 1024), H=64, B=16),
    *_sweep("B", (1, 4, 16, 64, 256, 1024), H=64, T=28),
    *_sweep("H", (16, 32, 64, 128, 256, 512, 1024), B=32, T=28),
    *_sweep("L", (1, 2, 4, 8), H=64, B=32, T=28),
]
# The heat map: how the peers compare over H x B.
MAP = [
    Case(f"H={H} B={B} T=32", H, H, 1, 1, B, 32, group="map")
    for H in (16, 32, 64, 128, 256, 512, 1024)
    for B in (1, 4, 16, 64, 256)
]
ALL = [*TASKS, *USERS, *SMALL, *STEPS, *WIDE, *DEEPBENCH, *FLASHRNN, *SWEEPS, *MAP]
GROUPS = tuple(dict.fromkeys(case.group for case in ALL))
CASES = {case.name: case for case in TASKS + USERS + SMALL + WIDE}  # those that a name alone finds
# Dense tasks: what the geometric means and the GPU timings are about first.
TASK_SHAPES = ("mnist-lstm", "mnist-lstm128", "mnist-blstm", "binary")


def parse(text: str) -> Case:
    """The case ``I,H,L,D,B,T``; raises ValueError for anything else."""
    numbers = text.split(",")
    if len(numbers) != 6 or not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"{text!r}: expected six positive integers I,H,L,D,B,T")
    I, H, L, D, B, T = map(int, numbers)
    if D not in (1, 2):
        raise ValueError(f"{text!r}: D, the number of directions, is {D}; expected 1 or 2")
    return Case(text, I, H, L, D, B, T)
