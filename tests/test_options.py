"""The options of fastlstm.LSTM that nn.LSTM lacks, and fastlstm.RNN, as modules."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import fastlstm
from fastlstm import reference

T, B, I, H = 6, 4, 3, 8
NOISE: dict[str, dict[str, Any]] = {
    "recurrent_dropout": {"recurrent_dropout": 0.5},
    "weight_dropout": {"weight_dropout": 0.5},
    "zoneout": {"zoneout": (0.5, 0.5)},
}
OPTIONS = NOISE | {
    "layer_norm": {"layer_norm": True},
    "peephole": {"peephole": True},
    "recompute": {"recompute": True},
    "forget_bias": {"forget_bias": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameters_of_nn_lstm_are_drawn_alike(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = dict(nn.LSTM(I, H, 2, bidirectional=True, proj_size=2).named_parameters())
    torch.manual_seed(3)
    ours = fastlstm.LSTM(I, H, 2, bidirectional=True, proj_size=2, **options)
    for name, p in ours.named_parameters():
        if name in theirs and not ("forget_bias" in options and name.startswith("bias")):
            assert torch.equal(p, theirs[name])


def test_added_parameters() -> None:
    lstm = fastlstm.LSTM(I, H, 2, bidirectional=True, peephole=True, layer_norm=True)
    extra = {
        "weight_ch": 3 * H,
        "weight_ln_ih": 4 * H,
        "weight_ln_hh": 4 * H,
        "weight_ln_c": H,
        "bias_ln_c": H,
    }
    shapes = {name: tuple(p.shape) for name, p in lstm.named_parameters()}
    for name, size in extra.items():
        for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
            assert shapes[name + suffix] == (size,)
    assert len(shapes) == 4 * (4 + len(extra))
    assert [len(group) for group in lstm.all_weights] == [9] * 4
    fill = dict(lstm.named_parameters())
    assert (fill["weight_ln_hh_l1"] == 1).all() and (fill["bias_ln_c_l0_reverse"] == 0).all()
    assert 0 < fill["weight_ch_l0"].abs().max() <= H**-0.5
    copied = fastlstm.LSTM(I, H, 2, bidirectional=True, peephole=True, layer_norm=True)
    copied.load_state_dict(lstm.state_dict(), strict=True)
    x = torch.randn(T, B, I)
    assert torch.equal(copied(x)[0], lstm(x)[0])


def test_forget_bias() -> None:
    lstm = fastlstm.LSTM(I, H, 2, bidirectional=True, forget_bias=1.0)

    def biases() -> list[Tensor]:
        named = dict(lstm.named_parameters())
        return [p + named[n.replace("_ih_", "_hh_")] for n, p in named.items() if "bias_ih" in n]

    def check() -> None:
        assert len(biases()) == 4
        for total in biases():
            assert (total[H : 2 * H] == 1).all()
            assert (total[:H] != 1).all() and (total[2 * H :] != 1).all()

    check()
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
    lstm.reset_parameters()
    check()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_survives_copies(options: dict[str, Any], backend: str) -> None:
    lstm = fastlstm.LSTM(I, H, **options).eval()
    x = torch.randn(T, B, I)
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(other(x)[0], lstm(x)[0])
        assert repr(other) == repr(lstm)
    name, value = next(iter(options.items()))
    assert f"{name}={value}" in repr(lstm)
    assert name not in repr(fastlstm.LSTM(I, H))


def test_pickles_of_before_the_options(backend: str) -> None:
    lstm = fastlstm.LSTM(I, H)
    for name in (*OPTIONS, "weight_dropout"):
        vars(lstm).pop(name, None)
    x = torch.randn(T, B, I)
    restored = pickle.loads(pickle.dumps(lstm))
    assert torch.equal(restored(x)[0], lstm(x)[0])


@pytest.mark.parametrize("options", NOISE.values(), ids=NOISE)
def test_noise_is_that_of_the_seed(backend: str, options: dict[str, Any]) -> None:
    lstm = fastlstm.LSTM(I, H, 2, **options)
    x = torch.randn(T, B, I)

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        y, _ = lstm(x)
        return [y, *torch.autograd.grad(y.sum(), list(lstm.parameters()))]

    first, again, other = run(5), run(5), run(6)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("options", NOISE.values(), ids=NOISE)
def test_evaluation_is_not_random(backend: str, options: dict[str, Any]) -> None:
    lstm, x = fastlstm.LSTM(I, H, **options).eval(), torch.randn(T, B, I)
    assert torch.equal(lstm(x)[0], lstm(x)[0])
    plain = fastlstm.LSTM(I, H)
    plain.load_state_dict(lstm.state_dict())
    assert torch.equal(plain(x)[0], lstm(x)[0]) == ("zoneout" not in options)


@pytest.mark.parametrize("options", NOISE.values(), ids=NOISE)
def test_backends_draw_alike(options: dict[str, Any]) -> None:
    lstm, x = fastlstm.LSTM(I, H, 2, bidirectional=True, **options), torch.randn(T, B, I)
    found = []
    for name in ("reference", "cpu") if fastlstm.backends()["cpu"].available else ("reference",):
        torch.manual_seed(0)
        with fastlstm.backend(name):
            found.append(lstm(x)[0])
    torch.testing.assert_close(found[0], found[-1])


def test_recurrent_dropout_is_one_mask_for_all_steps(backend: str) -> None:
    """Of h that goes into w_hh alone: it is neither in the output nor in the next h."""
    lstm = fastlstm.LSTM(1, H, recurrent_dropout=0.5)
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
        lstm.weight_hh_l0[2 * H : 3 * H] = torch.eye(H)
        lstm.bias_ih_l0[:H] = 10  # i is 1: c grows by tanh(mask * h)
        lstm.bias_ih_l0[3 * H :] = 10  # o is 1: h is tanh(c)
    start = torch.full((1, B, H), 0.5), torch.zeros(1, B, H)
    y, _ = lstm(torch.zeros(T, B, 1), start)
    open_ = y[0] != 0
    assert 0 < open_.sum() < open_.numel()
    assert torch.equal((y != 0).all(0), open_) and torch.equal((y != 0).any(0), open_)
    expected = torch.tensor(2 * 0.5).tanh().tanh().expand_as(y[0][open_])
    torch.testing.assert_close(y[0][open_], expected, rtol=1e-3, atol=0)


def test_zoneout_keeps_what_it_says(backend: str) -> None:
    """c that grows by 1 with every step shows which steps were left out."""
    p = (0.3, 0.6)
    lstm = fastlstm.LSTM(1, 64, zoneout=p)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        lstm.bias_ih_l0[:] = 20
    y, (_, _), c = lstm(torch.zeros(50, 40, 1), return_cell_states=True)
    before = torch.cat([torch.zeros(1, 40, 64), c[:-1]])
    grown = c - before
    assert set(grown.round().unique().tolist()) == {0.0, 1.0}
    assert abs((grown < 0.5).float().mean() - p[0]) < 0.01
    held = y[1:] == y[:-1]
    # where c has long been large, h differs from the one before only in being h of another step
    early = held[:2].float().mean()
    assert abs(early - (p[1] + (1 - p[1]) * p[0] * p[0])) < 0.1
    lstm.eval()
    _, _, c = lstm(torch.zeros(50, 40, 1), return_cell_states=True)
    torch.testing.assert_close(c[-1], torch.full_like(c[-1], 50 * (1 - p[0])), rtol=1e-4, atol=0)


def test_zoneout_is_independent_of_everything_but_its_place() -> None:
    """No two units, steps or sequences move together."""
    seed = torch.tensor([99])
    draws = torch.stack(
        [
            torch.stack([stay(torch.ones(32, 48), torch.zeros(32, 48), t) for t in range(40)])
            for stay in (reference._zone(0.5, seed, d, k) for d in (0, 1) for k in (0, 1))
        ]
    )  # [direction and kind, T, B, units]
    signs = draws * 2 - 1
    for dim in range(4):
        a, b = (
            signs.narrow(dim, 0, signs.shape[dim] - 1),
            signs.narrow(dim, 1, signs.shape[dim] - 1),
        )
        count = a.numel()
        assert abs((a * b).sum()) < 4.5 * count**0.5, dim
    assert abs(signs.sum()) < 4.5 * signs.numel() ** 0.5


def test_weight_dropout_is_that_of_dropout(backend: str) -> None:
    lstm, x = fastlstm.LSTM(I, H, weight_dropout=0.4), torch.randn(T, B, I)
    torch.manual_seed(1)
    got = lstm(x)[0]
    torch.manual_seed(1)
    weights = {n: p.detach() for n, p in lstm.named_parameters()}
    weights["weight_hh_l0"] = torch.dropout(weights["weight_hh_l0"], 0.4, True)
    want = torch.func.functional_call(fastlstm.LSTM(I, H), weights, (x,))[0]
    assert torch.equal(got, want)


def test_recompute_gives_the_same_bits(backend: str) -> None:
    """Of float32: its h of every step is kept unrounded."""
    x, lengths = torch.randn(T, B, I), torch.tensor([6, 0, 3, 5])
    kept = fastlstm.LSTM(I, H, 2, bidirectional=True)
    again = fastlstm.LSTM(I, H, 2, bidirectional=True, recompute=True)
    again.load_state_dict(kept.state_dict())

    def gradients(lstm: nn.Module) -> tuple[Tensor, ...]:
        y, (h_n, c_n) = lstm(x, lengths=lengths)
        return torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), list(lstm.parameters()))

    assert all(map(torch.equal, gradients(kept), gradients(again)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_bias": 1.0, "bias": False}, r"forget_bias=1\.0 needs bias=True"),
        ({"recurrent_dropout": 1.5}, r"recurrent_dropout must be a probability, 0 <= p <= 1"),
        ({"weight_dropout": -0.1}, r"weight_dropout must be a probability.*got -0\.1"),
        ({"zoneout": 0.1}, r"zoneout must be two probabilities \(c, h\), got 0\.1"),
        ({"zoneout": (0.1, 1.0)}, r"zoneout must be a probability, 0 <= p < 1, got 1\.0"),
        ({"zoneout": (0.1, 0.1, 0.1)}, r"zoneout must be two probabilities"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastlstm.LSTM(I, H, **options)


@pytest.mark.parametrize("name", ["layer_norm", "peephole", "zoneout"])
def test_to_torch_refuses_another_cell(name: str) -> None:
    with pytest.raises(ValueError, match=f"nn.LSTM has no {name}"):
        fastlstm.LSTM(I, H, **OPTIONS[name]).eval().to_torch()


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_dropout"])
def test_to_torch_in_evaluation(name: str) -> None:
    lstm, x = fastlstm.LSTM(I, H, **OPTIONS[name]), torch.randn(T, B, I)
    with pytest.raises(ValueError, match=rf"nn.LSTM has no {name}: call eval\(\)"):
        lstm.to_torch()
    torch.testing.assert_close(lstm.eval().to_torch()(x)[0], lstm(x)[0])


def test_functions_take_the_options(backend: str) -> None:
    lstm = fastlstm.LSTM(I, H, peephole=True, layer_norm=True, zoneout=(0.1, 0.2)).eval()
    x = torch.randn(T, B, I)
    got = fastlstm.functional.lstm(
        x, None, list(lstm.parameters()), peephole=True, layer_norm=True, zoneout=(0.1, 0.2)
    )
    assert torch.equal(got[0], lstm(x)[0])
    with pytest.raises(RuntimeError, match=r"expected 2 to 5 weights .* got 9 in all"):
        fastlstm.functional.lstm(x, None, list(lstm.parameters()))


def test_parametrized_option(backend: str) -> None:
    lstm, x = fastlstm.LSTM(I, H, peephole=True), torch.randn(T, B, I)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    lstm(x)[0].sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original1.grad.any()


# ---- RNN


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}],
    ids=str,
)
def test_rnn_is_nn_rnn(backend: str, nonlinearity: str, options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    theirs = nn.RNN(I, H, nonlinearity=nonlinearity, dtype=torch.float64, **options)
    torch.manual_seed(2)
    ours = fastlstm.RNN(I, H, nonlinearity=nonlinearity, dtype=torch.float64, **options)
    assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
        k: v.tolist() for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)
    rows = 4 if options.get("bidirectional") else 1
    x, h = torch.randn(T, B, I).double(), torch.randn(rows, B, H).double()
    unbatched = x[:, 0] if not options.get("batch_first") else x[0]
    if options.get("batch_first"):
        x = x.transpose(0, 1)
    packed = pack_sequence(
        [torch.randn(n, I).double() for n in (2, 5, 1, 3)], enforce_sorted=False
    )
    for arguments in ((x,), (x, h), (unbatched,), (unbatched, h[:, 0]), (packed,), (packed, h)):
        (y, h_n), (y_want, h_want) = ours(*arguments), theirs(*arguments)
        assert type(y) is type(y_want)
        if not isinstance(y, Tensor):
            y, y_want = y.data, y_want.data
        torch.testing.assert_close(y, y_want)
        torch.testing.assert_close(h_n, h_want)
    for module in (fastlstm.RNN.from_torch(theirs), ours.to_torch(), fastlstm.accelerate(theirs)):
        torch.testing.assert_close(module(x)[0], ours(x)[0])
    assert isinstance(fastlstm.accelerate(nn.Sequential(theirs))[0], fastlstm.RNN)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(T, B, I + 1),), RuntimeError, "last dimension of 3"),
        ((torch.zeros(T),), ValueError, "RNN: expected input to be 2-D or 3-D"),
        ((torch.zeros(T, B, I).double(),), ValueError, "RNN: input is torch.float64"),
        (
            (torch.zeros(T, B, I), torch.zeros(1, B, H + 1)),
            RuntimeError,
            r"expected h_0 \[1, 4, 8\]",
        ),
        (
            (torch.zeros(T, I), torch.zeros(1, B, H)),
            RuntimeError,
            "expected 2-D h_0 for unbatched",
        ),
        (
            (torch.zeros(T, B, I), (torch.zeros(1, B, H),) * 2),
            AttributeError,
            "hx must be a tensor, got tuple",
        ),
        ((torch.zeros(0, B, I),), RuntimeError, "at least one time step"),
    ],
    ids=str,
)
def test_rnn_errors(backend: str, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastlstm.RNN(I, H)(*arguments)


def test_rnn_refuses_other_nonlinearities() -> None:
    with pytest.raises(ValueError, match="Unknown nonlinearity 'sin'"):
        fastlstm.RNN(I, H, nonlinearity="sin")


def test_explains_options(backend: str) -> None:
    x = torch.zeros(T, B, I)
    for module in (fastlstm.LSTM(I, H, 2, layer_norm=True), fastlstm.RNN(I, H, 2)):
        told = fastlstm.explain(module, x)
        assert told.backend == backend and len(told.plan) == 2
