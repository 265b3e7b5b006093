"""Trains one task with several LSTM providers side by side.

All providers start from the same weights, see the same batches and draw the same dropout masks.
They take turns every few steps, so that a machine that slows down for a while slows all of them.
Where several processes train one task, a copy of each model that rank 0 trains alone takes turns
too: the time of its steps is what the efficiency compares with.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from copy import copy, deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm

from .. import BenchmarkError, extra
from ..speed.environment import environment
from .distributed import ALONE
from .record import Point, Record, describe
from .task import Score, Task, cross_entropy, right

PROVIDERS: dict[str, type[nn.Module]] = {"fastlstm": fastlstm.LSTM, "torch": nn.LSTM}
TURN = 10  # training steps of one provider before the next one takes its turn
ALONE_EVERY = 4  # turns of all processes to one turn of the copy that rank 0 trains alone


class Trainee:
    """One provider at work: its model, optimizer, clock and curve.

    `alone` is a copy that this process trains without the others, on whole batches.
    """

    def __init__(self, task: Task, provider: str, model: nn.Module) -> None:
        self.task = task
        self.provider = provider
        self.model = model
        self.alone: Trainee | None = None
        self.optimizer = task.optimizer(model)
        self.schedule = task.schedule(self.optimizer)
        self.seconds = 0.0
        self.steps = 0
        self.curve: list[Point] = []
        self._replica = task.processes.replicate(model)
        self._step_ms: list[float] = []
        self._losses: list[float] = []
        self._accuracies: list[float] = []

    def run(self, batches: Sequence[Tensor]) -> None:
        """Trains on these batches. The clock runs here only."""
        processes = self.task.processes
        # The same seed for every provider, so that they share their dropout masks; another one in
        # every process, because each has rows of its own.
        torch.manual_seed(self.task.seed + processes.rank * self.task.steps + self.steps)
        self.model.train()
        outcomes = []
        processes.wait()
        start = _now(self.task.device)
        for rows in batches:
            inputs, targets = self.task.batch(processes.share(rows))
            logits = self._replica(inputs)
            loss = cross_entropy(logits, targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            outcomes.append((loss.detach(), logits.detach(), targets))
        seconds = _now(self.task.device) - start
        self.seconds += seconds
        self._step_ms.append(1000 * seconds / len(batches))
        self.steps += len(batches)
        losses = [loss.item() for loss, _, _ in outcomes]
        accuracies = [
            right(logits, targets).double().mean().item() for _, logits, targets in outcomes
        ]
        self._losses += processes.mean(losses)
        self._accuracies += processes.mean(accuracies)
        if not math.isfinite(self._losses[-1]):
            raise FloatingPointError(
                f"{self.task.name}, {self.provider}: the loss is {self._losses[-1]} after "
                f"{self.steps} steps"
            )
        if self.alone and len(self._step_ms) % ALONE_EVERY == 1:
            self.alone.run(batches)

    def log(self, test: Score | None) -> Point:
        """Adds to the curve the means since its last point."""
        n = len(self._losses)
        loss, accuracy = sum(self._losses) / n, sum(self._accuracies) / n
        self._losses.clear()
        self._accuracies.clear()
        self.curve.append(Point(self.steps, self.seconds, loss, accuracy, test))
        return self.curve[-1]

    def record(self) -> Record:
        """The result so far; the last point of the curve must have a test."""
        test = self.curve[-1].test
        assert test is not None
        step_ms, processes = self.step_ms(), self.task.processes.count
        efficiency = None
        if self.alone:
            efficiency = self.alone.step_ms()["p50"] / (processes * step_ms["p50"])
        return Record(
            task=self.task.name,
            provider=self.provider,
            settings=self.task.settings,
            loss=test.loss,
            accuracy=test.accuracy,
            exact=test.exact,
            rows=test.rows,
            seconds=self.seconds,
            step_ms=step_ms,
            steps=self.steps,
            environment=environment(str(self.task.device)),
            curve=tuple(self.curve),
            processes=processes,
            samples_per_second=1000 * self.task.batch_size / (processes * step_ms["p50"]),
            efficiency=efficiency,
        )

    def step_ms(self) -> dict[str, float]:
        """The 20th, 50th and 80th percentile of the time of a step so far, in milliseconds."""
        percentiles = torch.tensor(self._step_ms).quantile(torch.tensor((0.2, 0.5, 0.8))).tolist()
        return dict(zip(("p20", "p50", "p80"), percentiles, strict=True))


def start(task: Task, providers: Sequence[str]) -> list[Trainee]:
    """A trainee for each provider, all with the weights that the seed gives to the first."""
    torch.manual_seed(task.seed)
    models = [task.build(PROVIDERS[provider]).to(task.device) for provider in providers]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for provider, model in zip(providers, models, strict=True):
        # The first steps load code and build caches: a copy of the model takes them off the clock.
        Trainee(task, provider, deepcopy(model)).run(list(islice(task.batches(), 2)))
    trainees = [Trainee(task, *pair) for pair in zip(providers, models, strict=True)]
    if task.processes.count > 1 and task.processes.leads:
        alone = copy(task)
        alone.processes = ALONE
        for trainee, copied in zip(trainees, start(alone, providers), strict=True):
            trainee.alone = copied
    return trainees


def train(
    task: Task,
    providers: Sequence[str],
    *,
    tensorboard: Path | None = None,
    quiet: bool = False,
) -> list[Trainee]:
    """Trains the task with all providers in turns, under one progress bar.

    Prints every point of the curves unless `quiet`, and writes summaries below the folder
    `tensorboard` if one is given. Raises `FloatingPointError` when a loss is not finite.
    """
    tqdm = extra("tqdm").tqdm
    trainees = start(task, providers)
    leads = task.processes.leads
    writers = {
        t: _writer(tensorboard / task.name / t.provider) for t in trainees if tensorboard and leads
    }
    batches = task.batches()
    running, step = list(trainees), 0
    with tqdm(
        total=task.steps, desc=task.name, unit="step", dynamic_ncols=True, disable=not leads
    ) as bar:
        while running and step < task.steps:
            next_log = step - step % task.log_every + task.log_every
            stop = min(step + TURN, next_log, task.steps)
            turn = list(islice(batches, stop - step))
            step = stop
            for trainee in running:
                trainee.run(turn)
            bar.update(len(turn))
            if step == next_log or step == task.steps:
                last = step == task.steps
                tested = last or step % task.test_every == 0
                for trainee in [trainee for trainee in trainees if trainee in running]:
                    test = task.test(trainee.model, last=last) if tested else None
                    point = trainee.log(test)
                    if trainee in writers:
                        _summarize(writers[trainee], trainee.model, point)
                    if not quiet:
                        bar.write(f"{task.name}  {trainee.provider:8}  {describe(point)}")
                    if test and task.stop_when_exact and test.exact == test.rows:
                        running.remove(trainee)
                bar.set_postfix_str(" | ".join(_brief(trainee) for trainee in trainees))
            running.reverse()  # who goes first alternates
    for writer in writers.values():
        writer.close()
    return trainees


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every training command has."""
    parser.add_argument(
        "--provider",
        choices=(*PROVIDERS, "both"),
        default="both",
        help="whose LSTM to train (default: %(default)s, side by side)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of weights, batches and dropout (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", help="where to train: cpu or cuda[:N] (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, help="number of CPU threads (default: PyTorch's choice)"
    )


def prepare(args: argparse.Namespace) -> list[str]:
    """Checks and applies the options of `add_arguments`; returns the names of the providers."""
    if args.threads is not None:
        if args.threads < 1:
            raise BenchmarkError(f"--threads must be 1 or more, not {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise BenchmarkError(f"--device {args.device} cannot be used: {error}") from error
    return list(PROVIDERS) if args.provider == "both" else [args.provider]


def _brief(trainee: Trainee) -> str:
    point = trainee.curve[-1]
    return f"{trainee.provider} {point.loss:.3f} {point.accuracy:.1%} {point.seconds:.1f} s"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _writer(folder: Path) -> Any:
    return extra("torch.utils.tensorboard").SummaryWriter(str(folder))


def _summarize(writer: Any, model: nn.Module, point: Point) -> None:
    writer.add_scalar("train/loss", point.loss, point.step)
    writer.add_scalar("train/accuracy", point.accuracy, point.step)
    if point.test is not None:
        writer.add_scalar("test/loss", point.test.loss, point.step)
        writer.add_scalar("test/accuracy", point.test.accuracy, point.step)
        for name, parameter in model.named_parameters():
            writer.add_histogram(name, parameter, point.step)
