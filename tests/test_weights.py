"""Weights from Keras and TensorFlow: against the equations of their steps, and real Keras."""

import copy
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastlstm
from fastlstm.weights import from_keras, from_tensorflow, to_keras

# Keras converts its variables so
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T, B, I, H, P = 5, 3, 4, 6, 2
Array = np.ndarray


def draw(*shape: int) -> Array:
    return torch.randn(shape, dtype=torch.float64).numpy()


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def keras_arrays(
    inputs: int = I, hidden: int = H, gates: int = 4, bias: bool = True
) -> list[Array]:
    shapes = [(inputs, gates * hidden), (hidden, gates * hidden), (gates * hidden,)]
    return [draw(*shape) for shape in shapes[: 2 + bias]]


def keras_lstm(x: Array, arrays: list[Array]) -> Array:
    """h of every step [B, T, H], by the equations of Keras's LSTM."""
    kernel, recurrent, *bias = arrays
    h = c = np.zeros((len(x), len(recurrent)))
    seen = []
    for t in range(x.shape[1]):
        z = x[:, t] @ kernel + h @ recurrent + (bias[0] if bias else 0)
        z_i, z_f, z_c, z_o = np.split(z, 4, -1)
        c = sigmoid(z_f) * c + sigmoid(z_i) * np.tanh(z_c)
        h = sigmoid(z_o) * np.tanh(c)
        seen.append(h)
    return np.stack(seen, 1)


def keras_rnn(x: Array, arrays: list[Array]) -> Array:
    kernel, recurrent, *bias = arrays
    h = np.zeros((len(x), len(recurrent)))
    seen = []
    for t in range(x.shape[1]):
        h = np.tanh(x[:, t] @ kernel + h @ recurrent + (bias[0] if bias else 0))
        seen.append(h)
    return np.stack(seen, 1)


def tensorflow_cell(
    inputs: int = I, projected: int = 0, peepholes: bool = False, prefix: str = ""
) -> dict[str, Array]:
    shapes = {"kernel": (inputs + (projected or H), 4 * H), "bias": (4 * H,)}
    if peepholes:
        shapes |= {f"w_{gate}_diag": (H,) for gate in "fio"}
    if projected:
        shapes["projection/kernel"] = (H, projected)
    return {prefix + name: draw(*shape) for name, shape in shapes.items()}


def tensorflow_lstm(x: Array, cell: dict[str, Array], forget_bias: float = 1.0) -> Array:
    """m of every step [B, T, P], by the equations of TensorFlow 1's LSTMCell."""
    w_i, w_f, w_o = (cell.get(f"w_{gate}_diag", 0.0) for gate in "ifo")
    projection = cell.get("projection/kernel", np.eye(H))
    m, c = np.zeros((len(x), projection.shape[1])), np.zeros((len(x), H))
    seen = []
    for t in range(x.shape[1]):
        i, j, f, o = np.split(np.hstack([x[:, t], m]) @ cell["kernel"] + cell["bias"], 4, -1)
        c = sigmoid(f + forget_bias + w_f * c) * c + sigmoid(i + w_i * c) * np.tanh(j)
        m = (sigmoid(o + w_o * c) * np.tanh(c)) @ projection
        seen.append(m)
    return np.stack(seen, 1)


def both(step: Callable[..., Array], x: Array, forward: Any, backward: Any) -> Array:
    return np.concatenate([step(x, forward), step(x[:, ::-1], backward)[:, ::-1]], -1)


def assert_computes(module: nn.Module, x: Array, want: Array) -> None:
    """That the module, batch first, has this output."""
    with torch.no_grad():
        torch.testing.assert_close(module(torch.tensor(x))[0], torch.tensor(want))


@pytest.mark.parametrize("bias", [True, False])
def test_keras_layer(backend: str, bias: bool) -> None:
    arrays, x = keras_arrays(bias=bias), draw(B, T, I)
    lstm = from_keras(arrays)
    assert type(lstm) is fastlstm.LSTM
    assert (lstm.batch_first, lstm.bias, lstm.weight_ih_l0.dtype) == (True, bias, torch.float64)
    assert_computes(lstm, x, keras_lstm(x, arrays))
    for want, got in zip(arrays, to_keras(lstm)[0], strict=True):
        np.testing.assert_array_equal(got, want)
    if bias:
        assert not lstm.bias_hh_l0.any()
        with torch.no_grad():
            lstm.bias_hh_l0 += 1
        np.testing.assert_array_equal(to_keras(lstm)[0][2], arrays[2] + 1)


@pytest.mark.parametrize("gates", [4, 1])
def test_keras_stack_of_bidirectional_layers(gates: int) -> None:
    step = keras_lstm if gates == 4 else keras_rnn
    layers = [
        keras_arrays(I, H, gates) + keras_arrays(I, H, gates),
        keras_arrays(2 * H, H, gates) + keras_arrays(2 * H, H, gates),
    ]
    module = from_keras(layers, dropout=0.5).eval()
    assert type(module) is (fastlstm.LSTM if gates == 4 else fastlstm.RNN)
    assert module.dropout == 0.5
    x = y = draw(B, T, I)
    for arrays in layers:
        y = both(step, y, arrays[:3], arrays[3:])
    with fastlstm.backend("reference"):
        assert_computes(module, x, y)
    for arrays, found in zip(layers, to_keras(module), strict=True):
        for want, got in zip(arrays, found, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("cell", [nn.LSTMCell, fastlstm.LSTMCell, nn.RNNCell])
def test_cells_and_modules_of_torch(cell: type[nn.Module]) -> None:
    gates = 1 if cell is nn.RNNCell else 4
    arrays = keras_arrays(gates=gates)
    into = cell(I, H, dtype=torch.float64)
    assert from_keras(arrays, into) is into
    x = draw(B, 1, I)
    h = into(torch.tensor(x[:, 0]))
    want = (keras_rnn if gates == 1 else keras_lstm)(x, arrays)[:, 0]
    torch.testing.assert_close(h if gates == 1 else h[0], torch.tensor(want))
    np.testing.assert_array_equal(to_keras(into)[0][1], arrays[1])


def test_into_keeps_parameters_dtype_and_layout() -> None:
    lstm = fastlstm.LSTM(I, H, dtype=torch.bfloat16)
    parameters = list(lstm.parameters())
    arrays = keras_arrays()
    from_keras(arrays, into=lstm)
    assert all(a is b for a, b in zip(parameters, lstm.parameters(), strict=True))
    assert lstm.weight_ih_l0.dtype is torch.bfloat16
    assert not lstm.batch_first
    kernel = to_keras(lstm)[0][0]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, torch.tensor(arrays[0]).bfloat16().float().numpy())


def test_kinds_of_arrays() -> None:
    kernel, recurrent, bias = (array.astype(np.float32) for array in keras_arrays())
    variable = SimpleNamespace(shape=recurrent.shape, numpy=lambda: recurrent)
    lstm = from_keras([kernel, variable, nn.Parameter(torch.tensor(bias))])
    assert lstm.weight_ih_l0.dtype is torch.float32
    for want, got in zip([kernel, recurrent, bias], to_keras(lstm)[0], strict=True):
        np.testing.assert_array_equal(got, want)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    assert recurrent.any()  # it was copied


def test_cudnn_biases_and_kernels() -> None:
    arrays, x = keras_arrays(), draw(B, T, I)
    want = keras_lstm(x, arrays)
    two = draw(4 * H)
    assert_computes(from_keras([*arrays[:2], np.stack([arrays[2] - two, two])]), x, want)
    # CuDNNLSTM: gate by gate, what Keras 2's own conversion makes of the kernels of an LSTM.
    kernel = np.hstack([k.T.reshape(k.shape) for k in np.hsplit(arrays[0], 4)])
    recurrent = np.hstack([k.T for k in np.hsplit(arrays[1], 4)])
    biases = np.concatenate([arrays[2] - two, two])
    assert_computes(from_keras([kernel, recurrent, biases]), x, want)


@pytest.mark.parametrize("projected", [0, P])
@pytest.mark.parametrize("peepholes", [False, True])
@pytest.mark.parametrize("forget_bias", [1.0, 0.0])
def test_tensorflow_cell(projected: int, peepholes: bool, forget_bias: float) -> None:
    cell, x = tensorflow_cell(I, projected, peepholes), draw(B, T, I)
    lstm = from_tensorflow(cell, forget_bias=forget_bias)
    assert (lstm.proj_size, lstm.peephole, lstm.batch_first) == (projected, peepholes, True)
    with fastlstm.backend("reference"):
        assert_computes(lstm, x, tensorflow_lstm(x, cell, forget_bias))


def test_tensorflow_list_and_rnn() -> None:
    cell, x = tensorflow_cell(), draw(B, T, I)
    assert_computes(from_tensorflow(list(cell.values())), x, tensorflow_lstm(x, cell))
    kernel, bias = draw(I + H, H), draw(H)
    want = keras_rnn(x, [kernel[:I], kernel[I:], bias])
    named = {"rnn/basic_rnn_cell/kernel": kernel, "rnn/basic_rnn_cell/bias": bias}
    into = nn.RNN(I, H, batch_first=True, dtype=torch.float64)
    for module in from_tensorflow(named), from_tensorflow([kernel, bias], into):
        with fastlstm.backend("reference"):
            assert_computes(module, x, want)


def test_tensorflow_checkpoint() -> None:
    scope = "model/encoder/stack_bidirectional_rnn"
    path = scope + "/cell_{}/bidirectional_rnn/{}/lstm_cell/"
    cells = {
        (k, way): tensorflow_cell(2 * H if k else I, prefix=path.format(k, way))
        for k in (0, 1)
        for way in ("bw", "fw")
    }
    variables = {name: array for cell in cells.values() for name, array in cell.items()}
    slots = {f"{name}/Adam": np.zeros_like(array) for name, array in variables.items()}
    others = {"model/dense/kernel": draw(H, 2), "model/dense/bias": draw(2), "step": np.array(3)}
    lstm = from_tensorflow(others | slots | variables, scope=scope)
    x = y = draw(B, T, I)
    for k in (0, 1):
        forward, backward = (
            {name.rpartition("/")[2]: array for name, array in cells[k, way].items()}
            for way in ("fw", "bw")
        )
        y = both(tensorflow_lstm, y, forward, backward)
    assert_computes(lstm, x, y)
    backward_of_second = path.format(1, "bw").rstrip("/")
    assert from_tensorflow(variables, scope=backward_of_second).input_size == 2 * H


def test_peepholes_that_are_zero_need_no_parameter() -> None:
    cell = tensorflow_cell(peepholes=True)
    lstm = fastlstm.LSTM(I, H)
    with pytest.raises(ValueError, match=r"no parameter weight_ch_l0, got \[18\]"):
        from_tensorflow(cell, lstm)
    for gate in "ifo":
        cell[f"w_{gate}_diag"] = np.zeros(H)
    from_tensorflow(cell, lstm)
    with_peepholes = fastlstm.LSTM(I, H, peephole=True)
    with pytest.raises(ValueError, match=r"nothing like weight_ch_l0 \[18\]"):
        to_keras(with_peepholes)
    from_keras(to_keras(lstm), with_peepholes)
    assert not with_peepholes.weight_ch_l0.any()
    to_keras(with_peepholes)


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(fastlstm.LSTM(I, H), "weight_hh_l0")


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "gru": (lambda: from_keras(keras_arrays(gates=3)), ValueError, "GRU"),
    "one array": (lambda: from_keras(keras_arrays()[:1]), ValueError, "got 1 arrays"),
    "flat stack": (lambda: from_keras(keras_arrays() * 3), ValueError, "got 9 arrays"),
    "no layer": (lambda: from_keras([]), ValueError, "expected kernel"),
    "order": (lambda: from_keras(keras_arrays()[::-1]), ValueError, r"got \[24\], \[6, 24\]"),
    "bias": (
        lambda: from_keras([*keras_arrays()[:2], draw(H)]),
        ValueError,
        r"expected a bias \[24\] or \[2, 24\]",
    ),
    "torch": (lambda: from_keras(nn.LSTM(I, H)), TypeError, "got LSTM"),
    "two sizes": (
        lambda: from_keras([keras_arrays(), keras_arrays(H, 2 * H)]),
        ValueError,
        "6 units.*12 units.*one by one",
    ),
    "not a stack": (
        lambda: from_keras([keras_arrays(), keras_arrays()]),
        ValueError,
        r"weight_ih_l1 of LSTM.* is \[24, 6\], got \[24, 4\]",
    ),
    "input size": (
        lambda: from_keras(keras_arrays(), nn.LSTM(I + 1, H)),
        ValueError,
        r"weight_ih_l0 of LSTM\(5, 6\) is \[24, 5\], got \[24, 4\]",
    ),
    "layers": (
        lambda: from_keras(keras_arrays(), nn.LSTM(I, H, 2, bidirectional=True)),
        ValueError,
        "1 layers x 1 directions do not fit into 2 layers x 2 directions",
    ),
    "no biases": (
        lambda: from_keras(keras_arrays(), fastlstm.LSTM(I, H, bias=False)),
        ValueError,
        r"no parameter bias_ih_l0, got \[24\]",
    ),
    "projection": (
        lambda: from_keras(keras_arrays(), fastlstm.LSTM(I, H, proj_size=P)),
        ValueError,
        r"weight_hh_l0 of LSTM.* is \[24, 2\], got \[24, 6\]",
    ),
    "layer_norm": (
        lambda: from_keras(keras_arrays(), fastlstm.LSTM(I, H, layer_norm=True)),
        ValueError,
        "has a weight_ln_ih_l0",
    ),
    "parametrized": (
        lambda: from_keras(keras_arrays(), parametrized()),
        ValueError,
        "no parameter weight_hh_l0.*remove its parametrization",
    ),
    "no lstm": (lambda: from_keras(keras_arrays(), nn.Linear(2, 2)), TypeError, "got Linear"),
    "options": (
        lambda: from_keras(keras_arrays(), nn.LSTM(I, H), dropout=0.5),
        TypeError,
        "dropout is for new modules",
    ),
    "to_keras projection": (
        lambda: to_keras(nn.LSTM(I, H, proj_size=P)),
        ValueError,
        r"weight_hr_l0 \[2, 6\]",
    ),
    "to_keras layer_norm": (
        lambda: to_keras(fastlstm.LSTM(I, H, layer_norm=True)),
        ValueError,
        "weight_ln_ih_l0",
    ),
    "to_keras gru": (lambda: to_keras(nn.GRU(I, H)), TypeError, "LSTM or RNN, got GRU"),
    "to_keras gru cell": (lambda: to_keras(nn.GRUCell(I, H)), TypeError, "got GRUCell"),
    "to_keras linear": (lambda: to_keras(nn.Linear(2, 2)), TypeError, "got Linear"),
    "tf list": (
        lambda: from_tensorflow(keras_arrays()),
        ValueError,
        r"expected \[kernel, bias\], got arrays \[4, 24\], \[6, 24\]",
    ),
    "tf kind": (lambda: from_tensorflow("path.ckpt"), TypeError, "got str"),
    "tf nothing": (lambda: from_tensorflow({"step": draw(1)}), ValueError, "no kernel and bias"),
    "tf scope": (
        lambda: from_tensorflow(tensorflow_cell(), scope="rnn"),
        ValueError,
        "scope 'rnn': found no",
    ),
    "tf no bias": (
        lambda: from_tensorflow({"rnn/kernel": draw(10, 24)}),
        ValueError,
        r"'rnn': expected a kernel and a bias, got \{'kernel': \[10, 24\]\}",
    ),
    "tf shape": (
        lambda: from_tensorflow([draw(H, 4 * H), draw(4 * H)]),
        ValueError,
        r"expected a kernel \[I\+P, 4H\] and bias \[4H\], got .*\[6, 24\]",
    ),
    "tf peepholes": (
        lambda: from_tensorflow(tensorflow_cell() | {"w_i_diag": draw(H)}),
        ValueError,
        "expected w_i_diag, w_f_diag, w_o_diag",
    ),
    "tf unknown": (
        lambda: from_tensorflow(tensorflow_cell() | {"input/gamma": draw(H)}),
        ValueError,
        "have no input/gamma",
    ),
    "tf of keras": (
        lambda: from_tensorflow({"kernel": draw(I, 24), "recurrent_kernel": draw(H, 24)}),
        ValueError,
        "use from_keras",
    ),
    "tf gru": (
        lambda: from_tensorflow({"gru_cell/gates/kernel": draw(8, 8)}, scope="gru_cell"),
        ValueError,
        "GRU",
    ),
    "tf two": (
        lambda: from_tensorflow(tensorflow_cell(prefix="a/") | tensorflow_cell(prefix="b/")),
        ValueError,
        "'a' and 'b' are both layer 0 forward: choose with scope",
    ),
    "tf gap": (
        lambda: from_tensorflow(tensorflow_cell(prefix="cell_1/")),
        ValueError,
        "expected 2 layers x 1 directions",
    ),
    "tf stacks side by side": (
        lambda: from_tensorflow(
            {
                name: array
                for way in ("fw", "bw")
                for k in (0, 1)
                for name, array in tensorflow_cell(H, prefix=f"{way}/x/cell_{k}/c/").items()
            }
        ),
        ValueError,
        "each direction is a stack of its own",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_refused_target_is_as_before() -> None:
    lstm = fastlstm.LSTM(I, H, 2)
    before = copy.deepcopy(lstm.state_dict())
    with pytest.raises(ValueError, match="weight_ih_l1"):
        from_keras([keras_arrays(), keras_arrays()], lstm)
    assert all(torch.equal(before[name], value) for name, value in lstm.state_dict().items())


# Keras itself, on its PyTorch backend: in float32, in which it multiplies float64 too


@pytest.fixture(scope="module")
def keras() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERAS_BACKEND", "torch")  # read when Keras is imported
        yield pytest.importorskip("keras", reason="Keras is not installed")


def built(keras: Any, layer: Any, features: int = I) -> Any:
    """The layer, built, with weights of no special values."""
    layer.build((B, T, features))
    layer.set_weights([single(*array.shape) / 2 for array in layer.get_weights()])
    return layer


def single(*shape: int) -> Array:
    return draw(*shape).astype(np.float32)


def outputs(layer: Any, x: Array) -> list[Array]:
    found = layer(x)
    found = found if isinstance(found, list | tuple) else [found]
    return [array.detach().numpy() for array in found]


OPTIONS = {"return_sequences": True, "return_state": True}


@pytest.mark.parametrize("bias", [True, False])
def test_layer_of_keras(keras: Any, backend: str, bias: bool) -> None:
    layer = built(keras, keras.layers.LSTM(H, use_bias=bias, **OPTIONS))
    lstm, x = from_keras(layer), single(B, T, I)
    y, (h_n, c_n) = lstm(torch.tensor(x))
    for got, want in zip((y, h_n[0], c_n[0]), outputs(layer, x), strict=True):
        torch.testing.assert_close(got.detach(), torch.tensor(want))

    other = built(keras, keras.layers.LSTM(H, use_bias=bias, **OPTIONS))
    other.set_weights(to_keras(lstm)[0])
    for got, want in zip(outputs(other, x), outputs(layer, x), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["LSTM", "SimpleRNN"])
def test_bidirectional_stack_of_keras(keras: Any, name: str) -> None:
    kind = getattr(keras.layers, name)
    wrapped = [keras.layers.Bidirectional(kind(H, return_sequences=True)) for _ in range(2)]
    layers = [built(keras, wrapped[0]), built(keras, wrapped[1], 2 * H)]
    x = single(B, T, I)
    want = outputs(layers[1], outputs(layers[0], x)[0])[0]
    module = from_keras(layers)
    with fastlstm.backend("reference"):
        assert_computes(module, x, want)
        assert_computes(from_keras([layer.get_weights() for layer in layers]), x, want)
    for layer, arrays in zip(layers, to_keras(module), strict=True):
        layer.set_weights(arrays)
    np.testing.assert_array_equal(outputs(layers[1], outputs(layers[0], x)[0])[0], want)


def test_cells_of_keras(keras: Any) -> None:
    cells = [keras.layers.LSTMCell(H) for _ in range(2)]
    layer = built(keras, keras.layers.RNN(cells, return_sequences=True))
    lstm, x = from_keras(layer), single(B, T, I)
    assert lstm.num_layers == 2
    assert_computes(lstm, x, outputs(layer, x)[0])
    assert_computes(from_keras(cells), x, outputs(layer, x)[0])


def test_masked_keras_layer_is_lengths(keras: Any) -> None:
    layer = built(
        keras,
        keras.layers.Bidirectional(
            keras.layers.LSTM(H, return_sequences=True, zero_output_for_mask=True)
        ),
    )
    x, lengths = single(B, T, I), torch.tensor([T, 1, 3])
    mask = (torch.arange(T) < lengths[:, None]).numpy()
    y, _ = from_keras(layer)(torch.tensor(x), lengths=lengths)
    want = layer(x, mask=mask).detach()
    torch.testing.assert_close(y.detach(), want)


REFUSED_LAYERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "activation": (lambda k: k.LSTM(H, activation="relu"), "activation tanh, .* has relu"),
    "recurrent": (
        lambda k: k.LSTM(H, recurrent_activation="hard_sigmoid"),
        "recurrent_activation sigmoid, .* has hard_sigmoid",
    ),
    "rnn": (lambda k: k.SimpleRNN(H, activation="linear"), "tanh or relu, .* has linear"),
    "backwards": (lambda k: k.LSTM(H, go_backwards=True), "go_backwards=True"),
    "merged": (lambda k: k.Bidirectional(k.LSTM(H), merge_mode="sum"), "merged by 'sum'"),
    "gru": (lambda k: k.GRU(H), "GRU"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED_LAYERS.values(), ids=list(REFUSED_LAYERS))
def test_refused_layers_of_keras(keras: Any, make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_keras(built(keras, make(keras.layers)))


def test_other_layers_of_keras(keras: Any) -> None:
    with pytest.raises(ValueError, match="this LSTMCell has no kernels: build it"):
        from_keras(keras.layers.LSTM(H))
    with pytest.raises(TypeError, match="got Dense"):
        from_keras(built(keras, keras.layers.Dense(H)))
    with pytest.raises(TypeError, match=r"layer 1: expected a recurrent layer.*got Sequential"):
        from_keras([built(keras, keras.layers.LSTM(H)), keras.Sequential()])
    relu = built(keras, keras.layers.SimpleRNN(H, activation="relu", **OPTIONS))
    rnn, x = from_keras(relu), single(B, T, I)
    assert rnn.nonlinearity == "relu"
    with fastlstm.backend("reference"):
        assert_computes(rnn, x, outputs(relu, x)[0])
    with pytest.raises(ValueError, match="activation relu does not fit"):
        from_keras(relu, nn.RNN(I, H))
