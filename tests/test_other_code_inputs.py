"""What other people's code does with an nn.LSTM: inputs, edits and mistakes.

Each test is named after what a user does. The yardstick is ``torch.nn`` on the same lines.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERY_BACKEND
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastlstm

T, B, I, H = 5, 3, 6, 8


def pair(kind: str = "LSTM", **options: Any) -> tuple[Any, Any]:
    """A module of torch.nn and the same of this library."""
    theirs = getattr(nn, kind)(I, H, **options)
    return theirs, getattr(fastlstm, kind).from_torch(copy.deepcopy(theirs))


def gradients(module: nn.Module, x: Tensor, use: Callable[[Tensor], object], **how: Any) -> Any:
    """Those of x and of all weights, after `use` has seen (and edited) the output."""
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    given = pack_padded_sequence(leaf * 1, [5, 4, 2]) if how.get("packed") else leaf * 1
    y, last = module(given)
    y = y.data if isinstance(y, PackedSequence) else y
    use(y)
    last = last if isinstance(last, tuple) else (last,)
    (y.sum() + sum(t.square().sum() for t in last)).backward()
    return [leaf.grad, *(p.grad for p in module.parameters())]


# ---- outputs that are edited in place -----------------------------------------------------------

EDITS: dict[str, Callable[[Tensor], object]] = {
    "scale": lambda y: y.mul_(1.5),
    "relu": lambda y: y.relu_(),
    "mask": lambda y: y.mul_((torch.arange(y.shape[-1]) % 2).to(y)),
    "assign": lambda y: y.__setitem__(0, 0.5),
    "of a view": lambda y: y.view(-1)[3:7].zero_(),
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bidirectional": ("LSTM", {"bidirectional": True}, {}),
    "projected": ("LSTM", {"proj_size": 3}, {}),
    "double": ("LSTM", {"dtype": torch.float64}, {}),
    "packed": ("LSTM", {}, {"packed": True}),
    "rnn": ("RNN", {}, {}),
    "rnn relu": ("RNN", {"nonlinearity": "relu", "bidirectional": True}, {}),
    "rnn packed": ("RNN", {}, {"packed": True}),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_editing_an_output_in_place_where_nn_allows_it(backend: str, kind: Any, edit: Any) -> None:
    name, options, how = kind
    theirs, ours = pair(name, **options)
    x = torch.randn(T, B, I, dtype=options.get("dtype"))
    torch.testing.assert_close(gradients(ours, x, edit, **how), gradients(theirs, x, edit, **how))


@EVERY_BACKEND
@pytest.mark.parametrize("layers", [1, 2])
def test_editing_an_output_in_place_where_nn_refuses(backend: str, layers: int) -> None:
    """One direction in float32: equal to what nn.LSTM computes from a copy of its output."""
    theirs, ours = pair(num_layers=layers)
    x = torch.randn(T, B, I)
    found = gradients(ours, x, lambda y: y.relu_())
    ours.zero_grad()
    leaf = x.clone().requires_grad_()
    y, (h, c) = theirs(leaf)
    (y.clone().relu_().sum() + h.square().sum() + c.square().sum()).backward()
    torch.testing.assert_close(found, [leaf.grad, *(p.grad for p in theirs.parameters())])


def test_editing_an_output_in_place_in_a_checkpoint(backend: str) -> None:
    """Where saved tensors go through hooks autograd does not see the edit."""
    _, ours = pair(bidirectional=True)
    x = torch.randn(T, B, I)
    wanted = gradients(ours, x, lambda y: y.relu_())
    ours.zero_grad()
    leaf = x.clone().requires_grad_()

    def block(rows: Tensor) -> Tensor:
        y, (h, c) = ours(rows)
        return y.relu_().sum() + h.square().sum() + c.square().sum()

    checkpoint(block, leaf, use_reentrant=False).backward()
    torch.testing.assert_close([leaf.grad, *(p.grad for p in ours.parameters())], wanted)


def test_editing_the_cell_states_in_place(backend: str) -> None:
    ours = fastlstm.LSTM(I, H)
    x = torch.randn(T, B, I, requires_grad=True)

    def gradient(edit: bool, hooks: bool) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y, _, c_all = ours(x, return_cell_states=True)
        total = y.sum() + c_all.sum()
        if edit:
            with torch.no_grad():
                c_all.zero_()
        return torch.autograd.grad(total, x)[0]

    torch.testing.assert_close(gradient(True, True), gradient(False, True))


@EVERY_BACKEND
def test_editing_an_input_before_backward_is_an_error(backend: str) -> None:
    ours, x = fastlstm.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    rows = x * 1
    y, _ = ours(rows)
    rows.mul_(2)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
@pytest.mark.parametrize("edit", [False, True])
def test_allowing_mutation_on_saved_tensors(backend: str, kind: str, edit: bool) -> None:
    theirs, ours = pair(kind, bidirectional=True)
    x, found = torch.randn(T, B, I), []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            rows = leaf * 1
            y, _ = module(rows)
            if edit:
                y.mul_(2)
                rows.mul_(3)
            y.sum().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(found[1], found[0])


@EVERY_BACKEND
@pytest.mark.parametrize("recompute", [False, True])
def test_editing_data_of_weights_between_forward_and_backward(
    backend: str, recompute: bool
) -> None:
    """It leaves no trace in a version; what nn.LSTM kept of the forward pass is still that."""
    theirs, ours = pair()
    ours.recompute = recompute
    x, found = torch.randn(T, B, I), []
    for module in (theirs, ours):

        def halve(y: Tensor, module: nn.Module = module) -> None:
            for p in module.parameters():
                p.data.mul_(0.5)

        found.append(gradients(module, x, halve))
    torch.testing.assert_close(found[1], found[0])


# ---- memory that is gone ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
@pytest.mark.parametrize("what", ["input", "weight_hh_l0", "bias_ih_l0", "output"])
def test_freeing_the_storage_of_what_backward_reads(backend: str, kind: str, what: str) -> None:
    """As FSDP and offloading do; nn.LSTM raises, or kills the process."""
    module, x = getattr(fastlstm, kind)(I, H), torch.randn(T, B, I)
    y, _ = module(x)
    total = y.sum()
    freed = {"input": x, "output": y}.get(what, getattr(module, what, None))
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"storage of .* has 0 bytes"):
        total.backward()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("left", [T * B * I, 2 * T * B * I - 1])
def test_freeing_a_part_of_a_storage_before_a_call(backend: str, mode: Any, left: int) -> None:
    module, both = fastlstm.LSTM(I, H), torch.randn(2 * T, B, I)
    x = both[T:]
    both.untyped_storage().resize_(4 * left)
    with mode(), pytest.raises(RuntimeError, match="storage of input"):
        module(x)


# ---- tensors of other kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_zero_tensors_that_have_no_memory(backend: str, mode: Any) -> None:
    zero = torch._efficientzerotensor
    module, cell, rnn = fastlstm.LSTM(I, H), fastlstm.LSTMCell(I, H), fastlstm.RNN(I, H)
    x, state = torch.zeros(T, B, I), torch.zeros(1, B, H)
    with mode():
        assert torch.equal(module(zero(x.shape))[0], module(x)[0])
        assert torch.equal(module(x, (zero(state.shape),) * 2)[0], module(x, (state, state))[0])
        assert torch.equal(cell(zero(x[0].shape))[0], cell(x[0])[0])
        assert torch.equal(rnn(zero(x.shape))[0], rnn(x)[0])


def test_a_gradient_that_has_no_memory(backend: str) -> None:
    module = fastlstm.LSTM(I, H)
    y, (h, _) = module(torch.randn(T, B, I))
    torch.autograd.backward([y, h], [torch._efficientzerotensor(y.shape), torch.ones_like(h)])
    found = module.weight_hh_l0.grad.clone()
    module.zero_grad()
    assert found.any()


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_sparse_weights(backend: str, name: str) -> None:
    theirs, ours = pair()
    for module in (theirs, ours):
        setattr(module, name, nn.Parameter(getattr(module, name).detach().to_sparse_csr()))
    x = torch.randn(T, B, I)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_tensors_that_kernels_cannot_read(backend: str) -> None:
    module, x = fastlstm.LSTM(I, H), torch.randn(T, B, I)
    quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    with pytest.raises(NotImplementedError, match="to_dense"):
        module(x.to_mkldnn())
    with pytest.raises(NotImplementedError, match=r"dequantize.*to_torch"):
        module(quantised)
    nested = torch.nested.nested_tensor([torch.randn(4, I), torch.randn(2, I)])
    with pytest.raises(RuntimeError, match="to_padded_tensor"):
        module(nested)


# ---- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_gives_the_dtypes_of_nn(
    backend: str, packed: bool, kind: str, state: torch.dtype | None
) -> None:
    """A PackedSequence is rounded by nn.RNN, not by nn.LSTM; any state decides there."""
    theirs, ours = pair(kind)
    x = torch.randn(T, B, I)
    found = []
    for module in (theirs, ours):
        hx = None
        if state is not None:
            h = torch.zeros(1, B, H, dtype=state)
            hx = (h, h) if kind == "LSTM" else h
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, last = module(pack_padded_sequence(x, [5, 4, 2]) if packed else x, hx)
        last = last if isinstance(last, tuple) else (last,)
        found.append([t.dtype for t in ((y.data if packed else y), *last)])
    assert found[1] == found[0]


# ---- modules that are taken apart ---------------------------------------------------------------


def test_keeping_the_first_layers_only(backend: str) -> None:
    """By an attribute, as nn.LSTM allows; and back."""
    theirs, ours = pair(num_layers=3)
    x = torch.randn(T, B, I)
    for layers in (1, 2, 3):
        theirs.num_layers = ours.num_layers = layers
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", ["bidirectional", "bias"])
def test_switching_an_option_off_by_its_attribute(backend: str, name: str) -> None:
    theirs, ours = pair(bidirectional=True) if name == "bidirectional" else pair()
    x = torch.randn(T, B, I)
    setattr(theirs, name, False)
    setattr(ours, name, False)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_the_mode_of_an_rnn_decides_and_not_its_nonlinearity(backend: str) -> None:
    theirs, ours = pair("RNN")
    x = torch.randn(T, B, I)
    theirs.nonlinearity = ours.nonlinearity = "relu"
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    theirs.mode = ours.mode = "RNN_RELU"
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_converting_a_module_of_an_old_pickle(backend: str, kind: str) -> None:
    """Pickles of long ago have no _flat_weights."""
    theirs, _ = pair(kind)
    old = type(theirs).__new__(type(theirs))
    gone = ("_flat_weights", "_flat_weight_refs", "proj_size")
    old.__dict__.update({k: v for k, v in theirs.__dict__.items() if k not in gone})
    x = torch.randn(T, B, I)
    ours = getattr(fastlstm, kind).from_torch(old)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert torch.equal(ours.to_torch()(x)[0], theirs(x)[0])


@EVERY_BACKEND
def test_the_weights_say_how_many_units_there_are(backend: str) -> None:
    """Not hidden_size, once somebody has set it; nn.LSTM reads past its memory then."""
    module, x = fastlstm.LSTM(I, H), torch.randn(T, B, I)
    want = module(x)
    module.hidden_size = H + 1
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(module(x), want)


def test_deleting_a_weight_is_an_error(backend: str) -> None:
    module = fastlstm.LSTM(I, H)
    del module.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        module(torch.randn(T, B, I))


def test_an_rnn_refuses_what_nn_refuses() -> None:
    for kind in (nn.RNN, fastlstm.RNN):
        with pytest.raises(ValueError, match="proj_size"):
            kind(I, H, proj_size=0)  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="Unknown nonlinearity 'sigmoid'"):
            kind(I, H, nonlinearity="sigmoid")


# ---- mistakes, and what the message says --------------------------------------------------------

WEIGHTS = [torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H)]
X = torch.randn(T, B, I)
PACKED = pack_padded_sequence(X, [5, 4, 2])
MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no weights": (
        lambda: fastlstm.functional.lstm(X, None, []), RuntimeError, "two matrices.*got 0"),
    "scalars": (
        lambda: fastlstm.functional.lstm(X, None, [torch.ones(())] * 4), RuntimeError, "matrices"),
    "an iterator": (
        lambda: fastlstm.functional.lstm(X, None, iter(WEIGHTS)),  # type: ignore[arg-type]
        TypeError, "list of tensors"),
    "a None among them": (
        lambda: fastlstm.functional.lstm(X, None, [None] * 4),  # type: ignore[list-item]
        TypeError, "NoneType"),
    "no layers": (
        lambda: fastlstm.functional.lstm(X, None, WEIGHTS, num_layers=0),
        ValueError, "num_layers"),
    "no layers of an RNN": (
        lambda: fastlstm.functional.rnn(X, None, WEIGHTS, num_layers=0),
        ValueError, "num_layers"),
    "no weights of a cell": (
        lambda: fastlstm.functional.lstm_cell(X[0], None, []), RuntimeError, "two matrices"),
    "int32 batch_sizes": (
        lambda: fastlstm.functional.lstm(
            PACKED.data, None, WEIGHTS, batch_sizes=PACKED.batch_sizes.int()),
        RuntimeError, "torch.int64, got torch.int32"),
    "half a state": (
        lambda: fastlstm.LSTM(I, H)(X, (torch.zeros(1, B, H), None)),  # type: ignore[arg-type]
        AttributeError, "pair of tensors.*NoneType"),
    "half a state of a cell": (
        lambda: fastlstm.LSTMCell(I, H)(X[0], (None, torch.zeros(B, H))),  # type: ignore[arg-type]
        AttributeError, "pair of tensors.*NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(backend: str, mistake: Any) -> None:
    call, error, match = mistake
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"], indirect=True)
def test_emptying_a_weight_before_backward_names_it(backend: str) -> None:
    module = fastlstm.LSTM(I, H)
    y, _ = module(X)
    module.weight_hh_l0.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="weight_hh") as failure:
        y.sum().backward()
    assert not re.search(r"csrc|\.cpp|\.h:", str(failure.value))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_an_operator_says_which_dtypes(backend: str) -> None:
    module = fastlstm.LSTM(I, H)
    y, _ = module(X)
    module.double()
    with pytest.raises(RuntimeError) as failure:
        y.sum().backward()
    message = str(failure.value)
    assert message.startswith("fastlstm: expected a weight to be torch.float32")
    assert message.endswith("got torch.float64")
