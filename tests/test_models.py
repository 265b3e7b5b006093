"""Models as people write them, trained before and after `fastlstm.accelerate`.

Every model below is an ordinary one of torch.nn, with the habits of its kind: a sentence at a
time, states carried over and detached, packed batches, cells in a Python loop, tied weights. A
task trains one for a few steps. Its losses, outputs and final weights have to come out as those of
the untouched model, by the oracle of the numerics: PyTorch's own distance in float32 from float64,
scaled to float64, is the yardstick.
"""

import copy
import io
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from oracle import compare, judge, measure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm

pytestmark = pytest.mark.filterwarnings("error")


Results = dict[str, Tensor]
THEIRS = (nn.LSTM, nn.LSTMCell, nn.RNN)
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """These models are too small for more."""
    torch.set_num_threads(1)


class Task(NamedTuple):
    """A model, what updates its weights, and its lessons: an output and a loss for each step."""

    model: Callable[[], nn.Module]
    optimizer: Callable[..., Any]
    lessons: Callable[[Any], Iterator[tuple[Tensor, Tensor]]]
    norm: float | None = None  # that gradients are clipped to


TASKS: dict[str, Task] = {}


def task(model: Callable[[], nn.Module], optimizer: Any, **options: Any) -> Callable[..., Any]:
    """Makes a task of the lessons that it decorates."""

    def add(lessons: Callable[[Any], Iterator[tuple[Tensor, Tensor]]]) -> Any:
        TASKS[lessons.__name__] = Task(model, optimizer, lessons, **options)
        return lessons

    return add


class ByHand:
    """p.data -= lr * p.grad, as the first tutorials do."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        for p in self.parameters:
            p.data.add_(p.grad, alpha=-self.lr)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.AdamW, lr=0.01)


def randn(model: nn.Module, *shape: int) -> Tensor:
    """The same numbers in whatever dtype the model has."""
    return torch.randn(shape).to(next(model.parameters()).dtype)


class Tagger(nn.Module):
    """One tag for each word of one sentence."""

    def __init__(self, words: int, tags: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 6)
        self.lstm = nn.LSTM(6, 5)
        self.hidden2tag = nn.Linear(5, tags)

    def forward(self, sentence: Tensor) -> Tensor:
        embeds = self.embedding(sentence)
        lstm_out, _ = self.lstm(embeds.view(len(sentence), 1, -1))
        return F.log_softmax(self.hidden2tag(lstm_out.view(len(sentence), -1)), dim=1)


@task(partial(Tagger, 9, 3), SGD)
def tagging(model: Tagger) -> Iterator[tuple[Tensor, Tensor]]:
    for length in (5, 4, 1, 7):
        sentence, tags = torch.randint(9, (length,)), torch.randint(3, (length,))
        scores = model(sentence)
        yield scores, F.nll_loss(scores, tags)


class NameClassifier(nn.Module):
    """The language of a name, from its characters as one-hot rows."""

    def __init__(self, letters: int, languages: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(letters, 8)
        self.h2o = nn.Linear(8, languages)

    def forward(self, line: Tensor) -> Tensor:
        _, hidden = self.rnn(line)
        return F.log_softmax(self.h2o(hidden[0]), dim=1)


@task(partial(NameClassifier, 11, 4), partial(ByHand, lr=0.1))
def naming(model: NameClassifier) -> Iterator[tuple[Tensor, Tensor]]:
    for length in (6, 2, 9, 4):
        line = F.one_hot(torch.randint(11, (length, 1)), 11).to(model.h2o.weight.dtype)
        scores = model(line)
        yield scores, F.nll_loss(scores, torch.randint(4, (1,)))


class Translator(nn.Module):
    """An encoder of packed sentences, and a decoder that looks at all of its outputs."""

    def __init__(self, words: int, step: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 4, padding_idx=0)
        self.encoder = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(6, 5)
        self.energy = nn.Linear(5, 6, bias=False)
        self.decoder = step(4 + 6, 5)
        self.out = nn.Linear(5 + 6, words)

    def attend(self, query: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        scores = torch.bmm(memory, self.energy(query).unsqueeze(2)).squeeze(2)
        scores = scores.masked_fill(padding, float("-inf"))
        return torch.bmm(scores.softmax(1).unsqueeze(1), memory).squeeze(1)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(source), lengths, batch_first=True, enforce_sorted=False
        )
        memory, (h_n, _) = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, batch_first=True)
        padding = torch.arange(memory.size(1)) >= lengths[:, None]
        h = torch.tanh(self.bridge(torch.cat([h_n[-2], h_n[-1]], dim=1)))
        c = torch.zeros_like(h)
        logits = []
        for t in range(target.size(1)):
            context = self.attend(h, memory, padding)
            step = torch.cat([self.embedding(target[:, t]), context], dim=1)
            if isinstance(self.decoder, nn.RNNCellBase):
                h, c = self.decoder(step, (h, c))
            else:
                _, (h, c) = self.decoder(step.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
                h, c = h.squeeze(0), c.squeeze(0)
            logits.append(self.out(torch.cat([h, context], dim=1)))
        return torch.stack(logits, dim=1)


def translate(model: Translator) -> Iterator[tuple[Tensor, Tensor]]:
    for lengths in ([3, 5, 1], [4, 4, 2], [1, 1, 1], [2, 6, 5]):
        source, target = torch.randint(1, 9, (3, max(lengths))), torch.randint(1, 9, (3, 5))
        source[torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]] = 0
        logits = model(source, torch.tensor(lengths), target[:, :-1])
        yield logits, F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


@task(partial(Translator, 9, nn.LSTM), ADAM, norm=1.0)
def translating(model: Translator) -> Iterator[tuple[Tensor, Tensor]]:
    return translate(model)


@task(partial(Translator, 9, nn.LSTMCell), ADAM, norm=1.0)
def translating_by_cell(model: Translator) -> Iterator[tuple[Tensor, Tensor]]:
    return translate(model)


class TextReader(nn.Module):
    """A CRNN: columns of a convolved image are the steps of stacked LSTMs, for CTC."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.MaxPool2d((4, 1)),
        )
        self.rnn = nn.LSTM(6, 5, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(10, characters + 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)  # [B, 3, 2, T]
        steps = maps.flatten(1, 2).permute(2, 0, 1)
        self.rnn.flatten_parameters()
        y, _ = self.rnn(steps)
        return self.fc(y).log_softmax(2)


@task(partial(TextReader, 4), ADAM)
def reading(model: TextReader) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(STEPS):
        scores = model(randn(model, 3, 1, 8, 9))
        texts = torch.randint(1, 5, (3, 4))
        steps, letters = torch.full((3,), 9), torch.tensor([4, 2, 0])
        yield scores, F.ctc_loss(scores, texts, steps, letters, zero_infinity=True)


class LanguageModel(nn.Module):
    """Words by words, with dropout and one matrix at both ends."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(words, size)
        self.rnn = nn.LSTM(size, size, 2, dropout=0.2)
        self.decoder = nn.Linear(size, words)
        self.decoder.weight = self.encoder.weight

    def forward(self, words: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        y, hidden = self.rnn(self.drop(self.encoder(words)), hidden)
        return self.decoder(self.drop(y)), hidden

    def init_hidden(self, batch: int) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        return tuple(weight.new_zeros(2, batch, self.rnn.hidden_size) for _ in range(2))


def repackage_hidden(h: Any) -> Any:
    return h.detach() if isinstance(h, Tensor) else tuple(repackage_hidden(v) for v in h)


@task(partial(LanguageModel, 9, 6), partial(ByHand, lr=1.0), norm=0.25)
def predicting_words(model: LanguageModel) -> Iterator[tuple[Tensor, Tensor]]:
    corpus = torch.randint(9, (5 * STEPS + 1, 3))
    hidden = model.init_hidden(3)
    for start in range(0, len(corpus) - 1, 5):
        hidden = repackage_hidden(hidden)
        output, hidden = model(corpus[start : start + 5], hidden)
        targets = corpus[start + 1 : start + 6]
        yield output, F.cross_entropy(output.flatten(0, 1), targets.flatten())


class WeightDrop(nn.Module):
    """Drops elements of a module's weight, of which it keeps the raw one (AWD-LSTM)."""

    def __init__(self, module: nn.Module, name: str, p: float) -> None:
        super().__init__()
        self.module, self.name, self.p = module, name, p
        raw = module._parameters.pop(name)
        self.register_parameter(name + "_raw", nn.Parameter(raw.data))
        module.flatten_parameters = self.nothing

    def nothing(self) -> None:
        return None

    def forward(self, *args: Any) -> Any:
        raw = getattr(self, self.name + "_raw")
        setattr(self.module, self.name, F.dropout(raw, self.p, self.training))
        return self.module(*args)


class DroppedLanguageModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__(9, 6)
        self.rnn = WeightDrop(self.rnn, "weight_hh_l0", 0.5)

    def init_hidden(self, batch: int) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        return weight.new_zeros(2, batch, 6), weight.new_zeros(2, batch, 6)


@task(DroppedLanguageModel, SGD)
def predicting_words_with_dropped_weights(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return predicting_words(model)


class First(nn.Module):
    """What nn.Sequential needs after a layer that returns a tuple."""

    def forward(self, results: Any) -> Tensor:
        return results[0]


class LastStep(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y[:, -1, :]


def forecaster() -> nn.Module:
    lstm = nn.LSTM(2, 7, batch_first=True, proj_size=3)
    again = nn.LSTM(3, 4, batch_first=True)
    return nn.Sequential(lstm, First(), again, First(), LastStep(), nn.Linear(4, 1))


@task(forecaster, ADAM)
def forecasting(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    series = randn(model, 3, 8 + STEPS, 2).cumsum(1)
    for start in range(STEPS):
        predicted = model(series[:, start : start + 8])  # a view, which batch_first transposes
        yield predicted, F.mse_loss(predicted, series[:, start + 8, :1])


class Speaker(nn.Module):
    """Frame after frame from the one before, by cells with zoneout of their own (Tacotron 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.prenet = nn.Linear(4, 3)
        self.cells = nn.ModuleList([nn.LSTMCell(3, 5), nn.LSTMCell(5, 5)])
        self.frame, self.end = nn.Linear(5, 4), nn.Linear(5, 1)

    def zoneout(self, old: Tensor, new: Tensor) -> Tensor:
        if not self.training:
            return 0.1 * old + 0.9 * new
        return torch.where(torch.rand(old.shape) < 0.1, old, new)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        start = frames.new_zeros(frames.size(1), 5)
        states, heard, out, ends = [(start, start)] * 2, torch.zeros_like(frames[0]), [], []
        for frame in frames:
            x = F.dropout(self.prenet(heard).relu(), 0.5)
            for k, cell in enumerate(self.cells):
                new = cell(x, states[k])
                states[k] = (
                    self.zoneout(states[k][0], new[0]),
                    self.zoneout(states[k][1], new[1]),
                )
                x = states[k][0]
            out.append(self.frame(x))
            ends.append(self.end(x))
            heard = frame if self.training else out[-1]
        return torch.stack(out), torch.stack(ends)


@task(Speaker, ADAM, norm=1.0)
def speaking(model: Speaker) -> Iterator[tuple[Tensor, Tensor]]:
    for k in range(STEPS):
        model.train(k != 2)
        frames = randn(model, 6, 3, 4)
        out, ends = model(frames)
        yield out, F.mse_loss(out, frames) + F.softplus(ends).mean()


class Autoencoder(nn.Module):
    """A sequence from its own last state, repeated for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 4, batch_first=True)
        self.decoder = nn.LSTM(4, 4, batch_first=True, bias=False)
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h_n, _) = self.encoder(x)
        code = h_n[-1].unsqueeze(1).expand(-1, x.size(1), -1)
        y, _ = self.decoder(code)
        return self.output(y.flip(1))


@task(Autoencoder, ADAM)
def reconstructing(model: Autoencoder) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(STEPS):
        x = randn(model, 4, 6, 3)
        again = model(x)
        yield again, F.l1_loss(again, x)


class Policy(nn.Module):
    """A recurrent actor-critic; a finished episode takes its state with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.cell = nn.LSTMCell(5, 6)
        self.actor, self.critic = nn.Linear(6, 2), nn.Linear(6, 1)

    def forward(
        self, observations: Tensor, done: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        hidden = []
        for x, ended in zip(self.body(observations).tanh(), done, strict=True):
            going_on = (1.0 - ended.to(h.dtype)).unsqueeze(1)
            h, c = self.cell(x, (h * going_on, c * going_on))
            hidden.append(h)
        features = torch.stack(hidden)
        return self.actor(features).log_softmax(-1), self.critic(features).squeeze(-1), (h, c)


class PolicyByReset(Policy):
    """The same policy, and the same parameters, on one call of a layer."""

    def forward(
        self, observations: Tensor, done: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        cell = self.cell
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
        features, (h, c) = fastlstm.functional.lstm(
            self.body(observations).tanh(),
            (state[0].unsqueeze(0), state[1].unsqueeze(0)),
            weights,
            reset=done,
        )
        return (
            self.actor(features).log_softmax(-1),
            self.critic(features).squeeze(-1),
            (h.squeeze(0), c.squeeze(0)),
        )


@task(Policy, ADAM, norm=0.5)
def acting(model: Policy) -> Iterator[tuple[Tensor, Tensor]]:
    state = (randn(model, 4, 6), randn(model, 4, 6))
    for _ in range(STEPS):
        observations, done = randn(model, 7, 4, 3), torch.rand(7, 4) < 0.3
        advantages, actions = randn(model, 7, 4), torch.randint(2, (7, 4, 1))
        logits, values, state = model(observations, done, state)
        state = (state[0].detach(), state[1].detach())
        chosen = logits.gather(-1, actions).squeeze(-1)
        entropy = -(logits.exp() * logits).sum(-1)
        loss = -(chosen * advantages) + 0.5 * (values - advantages).square() - 0.01 * entropy
        yield torch.cat([logits.flatten(), values.flatten()]), loss.mean()


def beginning(name: str) -> nn.Module:
    """The model of a task before it learns."""
    torch.manual_seed(0)
    return TASKS[name].model()


def train(name: str, model: nn.Module, change: Callable[[nn.Module], Any]) -> Results:
    """Outputs, losses and final weights; `change` comes after the optimizer has the weights."""
    _, optimizer, lessons, norm = TASKS[name]
    learner = optimizer(model.parameters())
    model = change(model)
    torch.manual_seed(1)
    results, losses = {}, []
    for k, (output, loss) in enumerate(lessons(model)):
        learner.zero_grad()
        loss.backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        learner.step()
        results[f"output {k}"] = output
        losses.append(loss)
    results["losses"] = torch.stack(losses)
    results |= dict(model.named_parameters())
    return {name: value.detach().double() for name, value in results.items()}


def with_weights(model: nn.Module, dtype: torch.dtype, weights: Results) -> nn.Module:
    model.to(dtype)
    model.load_state_dict(weights, strict=False)
    return model


@cache
def expectation(name: str) -> tuple[Results, dict[str, float]]:
    """What comes of a task in torch.nn, and how far rounding may move it."""

    def solve(dtype: torch.dtype, weights: Results) -> Results:
        return train(name, with_weights(beginning(name), dtype, weights), lambda m: m)

    weights = {k: p.detach().double() for k, p in beginning(name).named_parameters()}
    truth, allowed = judge(solve, torch.float64, weights)
    moved = measure(truth, {k: weights.get(k, value) for k, value in truth.items()})
    for k in weights:  # else the bound would hold for models that learn nothing
        assert moved[k] > 1000 * allowed[k], f"{k} has moved by {moved[k]}, allowed {allowed[k]}"
    return truth, allowed


def accelerated(model: nn.Module) -> nn.Module:
    model = fastlstm.accelerate(model)
    assert not any(type(module) in THEIRS for module in model.modules())
    return model


def hold(name: str, title: str, results: Results) -> None:
    compare(f"{name}, {title}", results, *expectation(name))


@pytest.mark.parametrize("name", TASKS)
def test_trains_as_before(backend: str, name: str) -> None:
    """With an optimizer that was there before."""
    hold(name, "accelerated", train(name, beginning(name).double(), accelerated))


@pytest.mark.parametrize("name", TASKS)
def test_checkpoint_of_the_original(backend: str, name: str) -> None:
    """Weights that were saved by the original go on where it left, and back."""
    file = io.BytesIO()
    torch.save(beginning(name).double().state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    model = accelerated(TASKS[name].model().double())
    model.load_state_dict(saved)
    hold(name, "from a checkpoint", train(name, model, lambda m: m))
    original = TASKS[name].model().double()
    original.load_state_dict(model.state_dict())
    assert all(map(torch.equal, original.parameters(), model.parameters()))


@pytest.mark.parametrize("name", TASKS)
def test_pickled_whole(backend: str, name: str) -> None:
    """A model that was saved whole is accelerated when it is loaded, saved and loaded again."""
    model: Any = beginning(name).double()
    for change in (lambda m: m, accelerated):
        file = io.BytesIO()
        torch.save(change(model), file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    hold(name, "pickled", train(name, model, lambda m: m))


@pytest.mark.parametrize("name", TASKS)
def test_copies_learn_on_their_own(backend: str, name: str) -> None:
    model = accelerated(beginning(name).double())
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    hold(name, "copied", train(name, twin, lambda m: m))
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
    hold(name, "the one copied", train(name, model, lambda m: m))


def test_optimizer_goes_on_from_its_checkpoint(backend: str) -> None:
    """Stopped half-way in torch.nn, resumed on the kernels."""
    name = "forecasting"
    truth, allowed = expectation(name)

    def half(model: nn.Module, learner: Any, steps: range) -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(1)
        for k, (output, loss) in enumerate(TASKS[name].lessons(model)):
            if k in steps:
                learner.zero_grad()
                loss.backward()
                learner.step()
                yield f"output {k}", output.detach()

    first = beginning(name).double()
    learner = TASKS[name].optimizer(first.parameters())
    found = dict(half(first, learner, range(STEPS // 2)))
    second = accelerated(TASKS[name].model().double())
    second.load_state_dict(first.state_dict())
    resumed = TASKS[name].optimizer(second.parameters())
    resumed.load_state_dict(learner.state_dict())
    found |= dict(half(second, resumed, range(STEPS // 2, STEPS)))
    found |= {k: p.detach() for k, p in second.named_parameters()}
    assert found.keys() == truth.keys() - {"losses"}
    compare("resumed", found, truth, allowed)


def test_reset_is_the_loop_over_a_cell(backend: str) -> None:
    """An episode's end as `reset`, in one call: the policy learns the same."""
    model = PolicyByReset().double()
    model.load_state_dict(beginning("acting").state_dict())
    hold("acting", "by reset", train("acting", model, lambda m: m))
