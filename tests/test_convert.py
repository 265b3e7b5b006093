"""from_torch, to_torch and accelerate: the same parameters in another module."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import fastlstm

I, H = 3, 5
KINDS = [(nn.LSTM, fastlstm.LSTM), (nn.LSTMCell, fastlstm.LSTMCell)]


class Own(nn.LSTM):
    """Someone's subclass, with a behaviour of its own."""

    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


class Extended(nn.LSTM):
    """Someone's subclass, which computes what nn.LSTM does."""

    names = ("h", "c")

    def __init__(self, size: int) -> None:
        super().__init__(size, size, batch_first=True)
        self.size = size

    def start(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, batch, self.size), torch.zeros(1, batch, self.size)


class Calling(Extended):
    """Its method needs the class that it was written in."""

    def note(self) -> str:
        return super().extra_repr()


def double(module: nn.Module, args: Any, output: Any) -> Any:
    return output[0] * 2, output[1]


@pytest.mark.parametrize(("theirs", "ours"), KINDS)
def test_there_and_back_shares_everything(
    theirs: type[nn.Module], ours: Any, backend: str
) -> None:
    source = theirs(I, H).eval()
    source.note = "mine"
    source.register_forward_hook(double)
    converted = ours.from_torch(source)
    back = converted.to_torch()
    x = torch.randn(4, I)
    for module, kind in (converted, ours), (back, theirs):
        assert type(module) is kind
        assert not module.training
        assert module.note == "mine"
        assert repr(module) == repr(source)
        assert all(map(lambda a, b: a is b, module.parameters(), source.parameters()))
        torch.testing.assert_close(module(x)[0], source(x)[0])
    assert len(list(converted.parameters())) == len(list(source.parameters()))

    converted.register_forward_hook(double)
    assert len(source._forward_hooks) == 1
    optimizer = torch.optim.SGD(source.parameters(), 0.1)
    converted(x)[0].sum().backward()
    optimizer.step()
    torch.testing.assert_close(back(x)[0], source(x)[0])
    assert torch.equal(copy.deepcopy(converted)(x)[0], converted(x)[0])


NORMS: dict[str, Callable[[nn.Module], Any]] = {
    "parametrized weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "parametrized spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: spectral_norm(m, "weight_hh_l0"),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalised_weights_come_along(backend: str, name: str) -> None:
    source = nn.LSTM(I, H, dtype=torch.float64)
    NORMS[name](source)
    source.eval()
    converted = fastlstm.LSTM.from_torch(source)
    assert isinstance(converted, fastlstm.LSTM)
    assert isinstance(converted, nn.LSTM)
    assert dict(converted.named_parameters()).keys() == dict(source.named_parameters()).keys()
    assert all(map(lambda a, b: a is b, converted.parameters(), source.parameters()))
    x = torch.randn(4, I, dtype=torch.float64)
    with torch.no_grad():
        for module in (converted, converted.to_torch()):
            torch.testing.assert_close(module(x)[0], source(x)[0])
            for p in source.parameters():
                p.mul_(1.5)
            torch.testing.assert_close(module(x)[0], source(x)[0])
    if parametrize.is_parametrized(source):
        parametrize.remove_parametrizations(converted, "weight_hh_l0")
        assert type(converted) is fastlstm.LSTM
        assert parametrize.is_parametrized(source)
        torch.testing.assert_close(converted(x)[0], source(x)[0])


def compiled(lstm: nn.Module) -> None:
    lstm.compile(backend="eager")


def bound_forward(lstm: nn.Module) -> None:
    lstm.forward = lambda x: x


def bound_hook(lstm: nn.Module) -> None:
    lstm.register_load_state_dict_pre_hook(lambda *args: None)


OBSTACLES = {"compiled": compiled, "its forward": bound_forward, "pre-hook": bound_hook}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_cannot_come_along_is_refused(reason: str) -> None:
    source = nn.LSTM(I, H)
    OBSTACLES[reason](source)
    with pytest.raises(ValueError, match=reason):
        fastlstm.LSTM.from_torch(source)
    model = nn.Sequential(source)
    assert fastlstm.accelerate(model)[0] is source


@pytest.mark.parametrize(
    ("ours", "source"),
    [
        (fastlstm.LSTM, nn.GRU(I, H)),
        (fastlstm.LSTM, Own(I, H)),
        (fastlstm.LSTM, nn.LSTMCell(I, H)),
        (fastlstm.LSTMCell, nn.LSTM(I, H)),
        (fastlstm.LSTM, fastlstm.LSTM(I, H)),
    ],
)
def test_other_modules_are_refused(ours: Any, source: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"got a .*{type(source).__name__}"):
        ours.from_torch(source)


class Model(nn.Module):
    """One of everything; the encoder is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(I, H, batch_first=True, bidirectional=True)
        self.layers = nn.ModuleList([self.encoder, nn.Linear(H, H)])
        self.cells = nn.ModuleDict({"read": nn.LSTMCell(I, H)})
        self.own = Own(I, H)
        self.gru = nn.GRU(I, H)
        self.optional = None
        self.register_module("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.encoder(x)
        return y.sum() + self.cells["read"](x[0])[0].sum()


def test_accelerate(
    backend: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    handle = model.encoder.register_forward_hook(double)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = dict(model.named_parameters())
    own, gru = model.own, model.gru
    x = torch.randn(4, 7, I)
    before = model(x)

    with caplog.at_level(logging.INFO, "fastlstm"):
        assert fastlstm.accelerate(model, verbose=True) is model
    printed = capsys.readouterr().out.splitlines()
    assert [record.getMessage() for record in caplog.records] == [
        f"accelerate: {line}" for line in printed
    ]
    assert printed == [
        "encoder: nn.LSTM -> fastlstm.LSTM(3, 5, batch_first=True, bidirectional=True)",
        "cells.read: nn.LSTMCell -> fastlstm.LSTMCell(3, 5)",
        "own: left, it is a test_convert.Own, a subclass, whose own behaviour would be lost: it "
        "defines forward",
        "gru: left, fastlstm has no GRU",
    ]

    assert type(model.encoder) is fastlstm.LSTM
    assert model.layers[0] is model.encoder
    assert type(model.cells["read"]) is fastlstm.LSTMCell
    assert model.own is own
    assert model.gru is gru
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    torch.testing.assert_close(model(x), before)

    model(x).backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    handle.remove()
    assert not model.encoder._forward_hooks


def test_accelerate_twice_and_with_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    model = fastlstm.accelerate(nn.Sequential(nn.LSTM(I, H)))
    lstm = model[0]
    assert fastlstm.accelerate(model, verbose=True)[0] is lstm
    assert "no nn.LSTM" in capsys.readouterr().out
    assert type(lstm) is fastlstm.LSTM


@pytest.mark.parametrize(("theirs", "ours"), KINDS)
def test_accelerate_a_bare_module(theirs: type[nn.Module], ours: type[nn.Module]) -> None:
    source = theirs(I, H)
    result = fastlstm.accelerate(source)
    assert type(result) is ours
    assert result.weight_ih_l0 is source.weight_ih_l0 if theirs is nn.LSTM else True


def test_accelerate_parametrized(backend: str) -> None:
    model = nn.Sequential(nn.LSTM(I, H))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    x = torch.randn(4, I)
    before = model(x)[0]
    names = list(model.state_dict())
    fastlstm.accelerate(model)
    assert isinstance(model[0], fastlstm.LSTM)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x)[0], before)


def test_restore_is_the_way_back(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    kinds = [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    x = torch.randn(4, 7, I)
    before = model(x)
    fastlstm.accelerate(model)
    assert fastlstm.restore(model, verbose=True) is model
    assert [type(module) for module in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(x), before)
    assert capsys.readouterr().out.splitlines() == [
        "encoder: fastlstm.LSTM(3, 5, batch_first=True, bidirectional=True) -> nn.LSTM",
        "cells.read: fastlstm.LSTMCell(3, 5) -> nn.LSTMCell",
    ]


def test_restore_leaves_what_nn_cannot_compute(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(
        fastlstm.LSTM(I, H, layer_norm=True, peephole=True),
        fastlstm.LSTM(I, H, recurrent_dropout=0.1),
    )
    fastlstm.restore(model, verbose=True)
    assert all(type(module) is fastlstm.LSTM for module in model)
    assert capsys.readouterr().out.splitlines() == [
        "0: left, nn.LSTM has no layer_norm, peephole",
        "1: left, nn.LSTM has no recurrent_dropout",
    ]
    assert type(fastlstm.restore(model.eval())[1]) is nn.LSTM


@pytest.mark.parametrize(("theirs", "ours"), KINDS)
def test_restore_a_bare_module(theirs: type[nn.Module], ours: type[nn.Module]) -> None:
    assert type(fastlstm.restore(ours(I, H))) is theirs
    assert type(fastlstm.restore(fastlstm.accelerate(theirs(I, H)))) is theirs


@pytest.mark.parametrize(
    ("options", "swapped"),
    [
        ({}, {"a.0", "a.1", "b"}),
        ({"include": "a.*"}, {"a.0", "a.1"}),
        ({"include": ["a.0", "b"]}, {"a.0", "b"}),
        ({"exclude": "a.1"}, {"a.0", "b"}),
        ({"include": "a.*", "exclude": ["*.0"]}, {"a.1"}),
        ({"dry_run": True}, set()),
    ],
)
def test_choosing_modules(
    options: dict[str, Any], swapped: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([nn.LSTM(I, H), nn.RNN(I, H)]), "b": nn.LSTM(I, H)})
    fastlstm.accelerate(model, **options)
    found = {n for n, m in model.named_modules() if isinstance(m, fastlstm.LSTM | fastlstm.RNN)}
    assert found == swapped
    printed = capsys.readouterr().out
    assert ("a.0: nn.LSTM -> fastlstm.LSTM(3, 5)" in printed) == ("dry_run" in options)
    fastlstm.restore(model)
    assert not any(isinstance(m, fastlstm.LSTM | fastlstm.RNN) for m in model.modules())


def test_patterns_may_name_what_is_swapped_already() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(I, H), "b": nn.LSTM(I, H)})
    for _ in range(2):
        fastlstm.accelerate(model, include="a")
    assert [type(module) for module in model.values()] == [fastlstm.LSTM, nn.LSTM]
    fastlstm.accelerate(model, exclude="a")
    assert [type(module) for module in model.values()] == [fastlstm.LSTM, fastlstm.LSTM]


@pytest.mark.parametrize("word", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(word: str) -> None:
    model = nn.Sequential(nn.LSTM(I, H), nn.Linear(H, H))
    with pytest.raises(ValueError, match=r"no recurrent module of this model matches lstm\*"):
        fastlstm.accelerate(model, **{word: ["0", "lstm*"]})
    assert type(model[0]) is nn.LSTM


def test_subclasses_that_only_add_are_swapped(backend: str) -> None:
    model = nn.Sequential(Extended(H), Calling(H))
    x = torch.randn(2, 4, H)
    before = model[0](x)[0]
    fastlstm.accelerate(model)
    for lstm, kind in zip(model, (Extended, Calling), strict=True):
        assert isinstance(lstm, fastlstm.LSTM)
        assert isinstance(lstm, kind)
        assert (lstm.names, lstm.size, type(lstm).__name__) == (("h", "c"), H, kind.__name__)
    lstm = model[0]
    torch.testing.assert_close(lstm(x, lstm.start(2))[0], before)
    assert model[1].note() == lstm.extra_repr()
    made = type(lstm)(H)
    for copied in copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), made:
        assert type(copied) is type(lstm)
        assert copied.start(2)[0].shape == (1, 2, H)
        assert torch.equal(copied(x)[0], lstm(x)[0]) == (copied is not made)
    restored = fastlstm.restore(model)[0]
    assert type(restored) is Extended
    assert restored.weight_hh_l0 is lstm.weight_hh_l0
    torch.testing.assert_close(restored(x, restored.start(2))[0], before)


class Meta(type):
    """A class of classes of its own."""


class Mixin(metaclass=Meta):
    """Stands between."""

    @property
    def twice(self) -> int:
        return 2 * self.hidden_size


class Mixed(Mixin, nn.RNN):
    """Inherits from something else too."""


class Slotted(nn.LSTM):
    """Has a place for its state that is not its dictionary."""

    __slots__ = ("place",)


def test_subclasses_of_several_classes() -> None:
    rnn = fastlstm.accelerate(Mixed(I, H))
    assert isinstance(rnn, Mixin) and isinstance(rnn, fastlstm.RNN)
    assert rnn.twice == 2 * H
    assert type(fastlstm.restore(rnn)) is Mixed
    assert type(fastlstm.accelerate(Slotted(I, H))) is Slotted


@pytest.mark.parametrize("name", ["weight_dropout", "zoneout", "specs", "_cache"])
@pytest.mark.parametrize("kind", [nn.LSTM, Mixed])
def test_an_attribute_of_ours_that_means_something_else(
    kind: type[nn.Module], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Your own attribute must not become a setting of this library."""
    if kind is Mixed and name in ("weight_dropout", "zoneout"):
        kind = Extended
    module = kind(H) if kind is Extended else kind(I, H)
    setattr(module, name, 0.5)
    assert fastlstm.accelerate(module, verbose=True) is module
    assert f"fastlstm has another meaning for its {name}" in capsys.readouterr().out


def test_a_submodule_of_a_name_of_ours() -> None:
    module = nn.LSTM(I, H)
    module.layer_norm = nn.LayerNorm(H)
    assert fastlstm.accelerate(module) is module
    with pytest.raises(ValueError, match="another meaning for its layer_norm"):
        fastlstm.LSTM.from_torch(module)


def test_settings_survive_the_way_there_and_back() -> None:
    lstm = fastlstm.LSTM(I, H, recurrent_dropout=0.25, forget_bias=1.0).eval()
    theirs = fastlstm.restore(lstm)
    assert not hasattr(theirs, "recurrent_dropout")
    again = fastlstm.accelerate(theirs)
    assert (again.recurrent_dropout, again.forget_bias) == (0.25, 1.0)


def test_patterns_see_every_path_of_a_shared_module() -> None:
    shared = nn.LSTM(I, H)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert fastlstm.accelerate(model, exclude="b")["a"] is shared
    fastlstm.accelerate(model, include="b")
    assert model["a"] is model["b"] is not shared


@pytest.mark.parametrize("patterns", [[], "", [5], [None], b"a"])
def test_patterns_that_are_none(patterns: Any) -> None:
    with pytest.raises(ValueError, match="include must be a pattern of paths"):
        fastlstm.accelerate(nn.Sequential(nn.LSTM(I, H)), include=patterns)


@pytest.mark.parametrize("model", [None, [nn.LSTM(I, H)]])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(TypeError, match="accelerate: expected a module, got"):
        fastlstm.accelerate(model)


def test_version() -> None:
    assert fastlstm.__version__[0].isdigit()
