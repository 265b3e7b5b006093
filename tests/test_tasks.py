"""The training tasks: their protocols, and short runs on small real data with both providers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.tasks import binary, data, hello, mnist, output, train
from benchmarks.tasks.record import Record
from benchmarks.tasks.task import Score, add_forget_bias

PROVIDERS = tuple(train.PROVIDERS)
SMALL = data.small_digits()


def digits_task(model: str, head: str = "last", **changes: Any) -> mnist.Mnist:
    protocol = replace(mnist.PROTOCOLS[model], log_every=None, test_every=None, **changes)
    return mnist.Mnist(SMALL, model, protocol, head)


def binary_task(steps: int) -> binary.Binary:
    task = binary.Binary(samples=512 * steps)
    task.log_every = task.test_every = steps // 2
    return task


TASKS = {
    "binary": lambda: binary_task(24),
    "mnist lstm": lambda: digits_task("lstm", batch=32, epochs=2),
    "mnist lstm128": lambda: digits_task("lstm128", batch=32, samples=2000),
    "mnist blstm (last)": lambda: digits_task("blstm", "last", batch=32, samples=2000),
    "mnist blstm (final)": lambda: digits_task("blstm", "final", batch=32, samples=2000),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns_with_both_providers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "split", lambda seed, split=binary.split: few(split(seed)))
    trainees = train.train(TASKS[name](), PROVIDERS, quiet=True)
    for trainee in trainees:
        record = trainee.record()
        first, *_, last = record.curve
        assert record.task == name
        assert last.loss < first.loss
        assert last.accuracy > first.accuracy
        assert last.test is not None
        assert (record.loss, record.exact, record.rows) == (
            last.test.loss,
            last.test.exact,
            last.test.rows,
        )
        assert record.steps == trainee.task.steps
        assert 0 < first.seconds < last.seconds == record.seconds


def few(parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """All training numbers, and a slice of the 786,431 for the test."""
    return parts[0], parts[1][:2000]


@pytest.mark.parametrize("name", TASKS)
def test_both_providers_start_from_the_same_weights(name: str) -> None:
    ours, peer = (trainee.model.state_dict() for trainee in train.start(TASKS[name](), PROVIDERS))
    assert ours.keys() == peer.keys()
    assert all(torch.equal(ours[key], peer[key]) for key in ours)


def test_two_trainees_share_batches_and_dropout() -> None:
    task = digits_task("blstm", batch=64, samples=1000)
    one, two = train.train(task, ["torch", "torch"], quiet=True)
    assert [point.loss for point in one.curve] == [point.loss for point in two.curve]
    assert one.curve[-1].test == two.curve[-1].test


def test_the_protocols_are_those_of_the_design() -> None:
    full = replace(
        SMALL, train_images=torch.zeros(60_000, 28, 28), train_labels=torch.zeros(60_000)
    )
    tasks = {model: mnist.Mnist(full, model, p) for model, p in mnist.PROTOCOLS.items()}
    assert {model: task.steps for model, task in tasks.items()} == {
        "lstm": 5 * 468,
        "lstm128": 100_000 // 128,
        "blstm": 5_000_000 // 256,
    }
    assert (tasks["blstm"].log_every, tasks["blstm"].test_every) == (10, 50)
    assert tasks["lstm"].log_every == tasks["lstm"].test_every == 468
    adam = tasks["blstm"].optimizer(tasks["blstm"].build(nn.LSTM))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.defaults["lr"] == 1e-3
    increment = binary.Binary()
    assert (increment.steps, increment.log_every) == (100 * 512, 512)
    model = increment.build(nn.LSTM)
    adagrad = increment.optimizer(model)
    assert isinstance(adagrad, torch.optim.Adagrad)
    assert adagrad.defaults["lr"] == 0.1
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert shapes["embedding.weight"] == (2, 10)
    assert shapes["lstm.weight_hh_l1"] == (4 * 32, 32)
    assert shapes["head.weight"] == (40, 32)


@pytest.mark.parametrize(("head", "sees_all_rows"), [("last", False), ("final", True)])
def test_the_heads_of_the_backward_direction(head: str, sees_all_rows: bool) -> None:
    model = mnist.RowReader(nn.LSTM, 8, mnist.PROTOCOLS["blstm"], head).eval()
    with torch.no_grad():
        model.classify.weight[:, : model.lstm.hidden_size] = 0  # the forward direction
    images = SMALL.test_images[:4].clone().requires_grad_()
    model(images).sum().backward()
    rows_seen = images.grad.abs().sum((0, 2)) > 0
    assert rows_seen[-1]
    assert rows_seen[:-1].all() if sees_all_rows else not rows_seen[:-1].any()


def test_the_forget_bias_is_added_once_to_the_sum_of_both_biases() -> None:
    lstm = nn.LSTM(3, 4, 2, bidirectional=True)
    before = [p.clone() for p in lstm.parameters()]
    add_forget_bias(lstm, 1.0)
    for (name, after), old in zip(lstm.named_parameters(), before, strict=True):
        added = torch.zeros_like(old)
        if "bias_ih" in name:
            added[4:8] = 1
        assert torch.equal(after, old + added)


def test_binary_numbers_split_and_bits() -> None:
    training, test = binary.split(0)
    assert (len(training), len(test)) == (262_144, 786_431)
    assert torch.equal(torch.cat([training, test]).sort().values, torch.arange(2**20 - 1))
    assert binary.to_bits(torch.tensor([6])).tolist() == [[0, 1, 1] + [0] * 17]
    inputs, targets = binary.Binary().batch(torch.arange(1000))
    powers = 2 ** torch.arange(20)
    assert torch.equal((inputs * powers).sum(1), training[:1000])
    assert torch.equal((targets * powers).sum(1), training[:1000] + 1)


def test_binary_prints_the_rows_it_gets_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    class AlwaysZero(nn.Module):
        def forward(self, bits: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 0.0]).expand(*bits.shape, 2)

    trainee = train.Trainee.__new__(train.Trainee)
    trainee.provider, trainee.steps, trainee.model = "torch", 7, AlwaysZero()
    binary.print_failures(trainee, torch.arange(4), limit=2)
    out = capsys.readouterr().out.splitlines()
    assert "0 of 4 test rows exact after 7 steps" in out[1]
    assert "0 + 1" in out[2]
    assert "expected 10000000000000000000, predicted 00000000000000000000" in out[2]
    assert "2 more" in out[4]


def test_binary_stops_when_every_test_row_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        binary.Binary, "test", lambda self, model, last: Score(0.0, 1.0, exact=9, rows=9)
    )
    (trainee,) = train.train(binary_task(20), ["torch"], quiet=True)
    assert trainee.steps == 10


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.LSTM):
        def reset_parameters(self) -> None:
            for parameter in self.parameters():
                nn.init.constant_(parameter, float("nan"))

    monkeypatch.setitem(train.PROVIDERS, "torch", Broken)
    with pytest.raises(FloatingPointError, match="mnist lstm, torch: the loss is nan"):
        train.train(digits_task("lstm", batch=32, epochs=1), ["torch"], quiet=True)


def test_tensorboard_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: dict[str, list[float]] = {}

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.setdefault(name, []).append(value)

        def add_histogram(self, name: str, values: torch.Tensor, step: int) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(train, "_writer", lambda folder: Writer())
    task = digits_task("lstm", batch=64, epochs=2)
    (trainee,) = train.train(task, ["torch"], tensorboard=tmp_path, quiet=True)
    assert scalars["train/loss"] == [point.loss for point in trainee.curve]
    assert scalars["test/accuracy"] == [p.test.accuracy for p in trainee.curve if p.test]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_hello_learns_ihello(provider: str) -> None:
    assert hello.learn(provider)[-1] == "ihello"


def test_the_speed_up_is_the_ratio_of_median_steps() -> None:
    record = Record(
        task="binary", provider="torch", settings={}, loss=0.5, accuracy=0.75, exact=1, rows=4,
        seconds=9.0, step_ms={"p50": 3.0}, steps=3, environment={}, curve=(),
    )  # fmt: skip
    ours = replace(record, provider="fastlstm", step_ms={"p50": 2.0})
    lines = output.table([ours, record]).splitlines()
    assert lines[2].endswith("1.50x")
    assert lines[3].endswith("1.00x")
    assert "75.000%  1 of 4" in lines[2]
    assert output.table([ours]).splitlines()[2].rstrip().endswith("2.00")
