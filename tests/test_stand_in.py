"""What people's code asks of a module, and what its classes and modes see: as of nn.LSTM."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode

import fastlstm

T, B, I, H = 5, 2, 3, 4
KINDS: list[tuple[Any, Any]] = [
    (nn.LSTM, fastlstm.LSTM),
    (nn.LSTMCell, fastlstm.LSTMCell),
    (nn.RNN, fastlstm.RNN),
]


def accelerated(module: nn.Module) -> Any:
    return fastlstm.accelerate(nn.Sequential(module))[0]


def x_of(module: nn.Module) -> Tensor:
    return torch.randn(B, I) if isinstance(module, nn.LSTMCell) else torch.randn(T, B, I)


@pytest.mark.parametrize(("theirs", "ours"), KINDS)
def test_ask_isinstance(theirs: Any, ours: Any) -> None:
    module = accelerated(theirs(I, H))
    assert type(module) is ours
    assert not issubclass(ours, theirs)
    assert isinstance(module, theirs)
    assert isinstance(module, (nn.GRU, theirs))
    assert isinstance(module, ours)
    assert not isinstance(module, nn.GRU)
    assert issubclass(module.__class__, theirs)
    assert module.__class__.__name__ == theirs.__name__
    assert type(module.__class__(I, H)) is ours  # self.__class__(...) makes another one
    assert isinstance(fastlstm.restore(module), theirs)
    assert isinstance(ours(I, H), theirs)


@pytest.mark.parametrize(("theirs", "ours"), KINDS)
def test_copy_and_pickle_what_isinstance_takes_for_torchs(theirs: Any, ours: Any) -> None:
    source = theirs(I, H)
    module = accelerated(source)
    x = x_of(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(module, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
    copies += [copy.copy(module), copy.deepcopy(module), torch.load(file, weights_only=False)]
    for other in copies:
        assert type(other) is ours
        assert isinstance(other, theirs)
        assert repr(other) == repr(source)
        assert other.state_dict().keys() == source.state_dict().keys()
        assert torch.equal(other(x)[0], module(x)[0])
        assert type(other.to_torch()) is theirs


def test_initialise_a_model_by_apply() -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            nn.init.constant_(module.bias_ih_l0, 0.5)

    model = fastlstm.accelerate(nn.Sequential(nn.LSTM(I, H), nn.Linear(H, 1))).apply(init)
    assert (model[0].bias_ih_l0 == 0.5).all()


def test_call_the_methods_that_only_nn_lstm_has(backend: str) -> None:
    theirs = nn.LSTM(I, H, 2, bidirectional=True, proj_size=2, batch_first=True)
    ours, x = accelerated(theirs), torch.randn(B, T, I)
    hx = torch.randn(4, B, 2), torch.randn(4, B, H)
    order = torch.tensor([1, 0])
    for module in (theirs, ours):
        assert module.get_expected_cell_size(x, None) == (4, B, H)
        assert module.get_expected_hidden_size(x, None) == (4, B, 2)
        assert module.check_forward_args(x, hx, None) is None
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
            module.check_forward_args(x, (hx[0], hx[0]), None)
        permuted = module.permute_hidden(hx, order)
        assert all(torch.equal(a, b[:, order]) for a, b in zip(permuted, hx, strict=True))
    torch.testing.assert_close(nn.LSTM.forward(ours, x, hx)[0], theirs(x, hx)[0])


class Masked(nn.Module):
    """A module as TorchRL's: an LSTM of its own, which takes a mask, or PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(I, H)

    def forward(self, x: Tensor) -> Tensor:
        options = {} if isinstance(self.lstm, nn.LSTM) else {"mask": torch.ones(T, B)}
        return self.lstm(x, **options)[0]


class Language(nn.Module):
    """A language model as ESPnet's: the class of its layer says whether a state is a pair."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(I, H)

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(1, B, H)
        state = (zeros, zeros) if isinstance(self.rnn, nn.LSTM) else zeros
        for step in x:
            y, state = self.rnn(step.unsqueeze(0), state)
        return y


class Recurrent(nn.Sequential):
    """A sequence as PFRL's: which of its modules have a state?"""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            recurrent = isinstance(module, (nn.LSTM, nn.RNN, nn.GRU))
            x = module(x, None)[0] if recurrent else module(x)
        return x


@pytest.mark.parametrize(
    "build",
    [
        Masked,
        lambda: Language(nn.LSTM),
        lambda: Language(nn.RNN),
        lambda: Recurrent(nn.Linear(I, I), nn.LSTM(I, H), nn.Tanh(), nn.RNN(H, H)),
    ],
)
def test_models_that_ask_when_they_run(build: Callable[[], nn.Module], backend: str) -> None:
    model, x = build(), torch.randn(T, B, I)
    want = model(x)
    torch.testing.assert_close(fastlstm.accelerate(model)(x), want)


def test_one_graph_and_isinstance_at_once(backend: str) -> None:
    model, x = fastlstm.accelerate(Masked()), torch.randn(T, B, I)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_parametrize_after_accelerate(backend: str) -> None:
    source, x = nn.LSTM(I, H), torch.randn(T, B, I)
    module = accelerated(source)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrizations.weight_norm(module, name)
    assert isinstance(module, nn.LSTM)
    torch.testing.assert_close(module(x)[0], source.forward(x)[0])
    compiled: Any = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], module(x)[0])
    torch._dynamo.reset()
    assert type(fastlstm.restore(module)).__name__ == "ParametrizedLSTM"
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrize.remove_parametrizations(module, name)
    assert type(module) is fastlstm.LSTM


def test_swap_the_class_of_a_module() -> None:
    """As libraries do that wrap modules in place."""
    module = accelerated(nn.LSTM(I, H))
    before = module.__class__
    x = torch.randn(T, B, I)
    want = module(x)[0]
    module.__class__ = type("Wrapped", (before,), {"note": "mine"})
    assert isinstance(module, nn.LSTM)
    assert module.note == "mine"
    assert torch.equal(module(x)[0], want)
    module.__class__ = before
    assert type(module) is fastlstm.LSTM


def test_derive_a_class_from_ours() -> None:
    seen = []

    class Mine(fastlstm.LSTM):
        def __init_subclass__(cls) -> None:
            seen.append(cls)

    class Further(Mine):
        pass

    assert not isinstance(Further(I, H), nn.LSTM)  # a class between would be seen
    assert seen == [Further]

    class Plain(fastlstm.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return super().forward(input, hx)

    module = Plain(I, H)
    assert isinstance(module, nn.LSTM)
    x = torch.randn(T, B, I)
    assert torch.equal(module(x)[0], fastlstm.LSTM.forward(module, x)[0])


def test_put_our_class_in_torch_nn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for theirs, ours in KINDS:
        monkeypatch.setattr(nn, theirs.__name__, ours)
    model = nn.Sequential(torch_rnn.LSTM(I, H))
    assert type(fastlstm.accelerate(model, verbose=True)[0]) is fastlstm.LSTM
    assert "0: nn.LSTM -> fastlstm.LSTM" in capsys.readouterr().out
    assert type(fastlstm.LSTM.from_torch(torch_rnn.LSTM(I, H))) is fastlstm.LSTM
    assert type(nn.LSTM(I, H).to_torch()) is torch_rnn.LSTM
    assert type(fastlstm.restore(model)[0]) is torch_rnn.LSTM


@pytest.mark.slow
def test_import_again_what_was_forgotten() -> None:
    code = """
import sys, torch, fastlstm
x = torch.randn(5, 2, 3)
old = fastlstm.LSTM(3, 4)
program = torch.export.export(old, (x,)).module()
want = old(x)[0]
for _ in range(2):
    for name in [n for n in sys.modules if n.partition(".")[0] == "fastlstm"]:
        del sys.modules[name]
    import fastlstm
    assert type(old) is not fastlstm.LSTM
    new = fastlstm.LSTM(3, 4)
    new.load_state_dict(old.state_dict())
    for module in (old, new, program, torch.export.export(new, (x,)).module()):
        y = module(x)[0]
        assert torch.equal(y, want)
        y.sum().backward()
        assert all(p.grad is not None for p in module.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_accelerate_a_scripted_model(capsys: pytest.CaptureFixture[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(I, H)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.cell(x)

    scripted = torch.jit.script(Model())
    assert fastlstm.accelerate(scripted, verbose=True, include="cell") is scripted
    assert "cell: left, it is TorchScript" in capsys.readouterr().out


class Marked(Tensor):
    """Somebody's tensors."""


@pytest.mark.parametrize(("theirs", "ours"), KINDS)
def test_tensors_of_a_class_give_tensors_of_the_class(
    theirs: Any, ours: Any, backend: str
) -> None:
    source = theirs(I, H)
    module, x = ours.from_torch(source), x_of(source)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for layer in (source, module):
                y, final = layer(x.as_subclass(Marked))
                states = final if isinstance(final, tuple) else (final,)
                assert {type(t) for t in (y, *states)} == {Marked}


class Counting(TorchFunctionMode):
    """Counts what a mode sees."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("theirs", "ours"), KINDS)
def test_modes_see_no_more_calls_than_of_nn(theirs: Any, ours: Any, backend: str) -> None:
    source = theirs(I, H)
    x = x_of(source)
    counts = []
    for module in (source, ours.from_torch(source)):
        with Counting() as mode:
            module(x)[0].sum().backward()
        counts.append(mode.count)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_call_for_per_sample_gradients(kind: str, batch_first: bool, backend: str) -> None:
    theirs = getattr(nn, kind)(I, H, batch_first=batch_first, dtype=torch.float64)
    ours = copy.deepcopy(getattr(fastlstm, kind).from_torch(theirs))
    x = torch.randn(T, B, I, dtype=torch.float64)
    for module in (theirs, ours):
        call = call_for_per_sample_grads(
            module, batch_size=T if batch_first else B, batch_first=batch_first
        )
        call(x)[0].sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad_sample, b.grad_sample)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantize_eagerly_and_hear_what_to_do() -> None:
    def quantized(layer: nn.Module) -> nn.Module:
        model = nn.Sequential(quantization.QuantStub(), layer)
        model.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(model.eval())
        prepared(torch.randn(T, B, I))
        return quantization.convert(prepared)

    x = torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match=r"fastlstm\.restore\(model\), or to_torch"):
        quantized(accelerated(nn.LSTM(I, H)))(x)
    found = quantized(fastlstm.restore(accelerated(nn.LSTM(I, H))))[1]
    assert type(found) is torch.ao.nn.quantized.LSTM
