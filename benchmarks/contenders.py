"""The contenders of `speed`: calls that do the same work on the same numbers, and are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastlstm

from . import BenchmarkError
from .cases import Case

PROVIDERS = ("fastlstm", "torch", "onnxruntime")
MODES = ("infer", "train", "step")


class Mismatch(BenchmarkError):
    """A contender's numbers are not those of the others, so its time means nothing."""


@dataclass(frozen=True)
class Work:
    """What a contender does: run over x, run and go back, or take one step from the last state."""

    mode: str
    x: Tensor | PackedSequence  # [T, B, I]; one step of it in mode "step"
    state: tuple[Tensor, Tensor] | None  # h and c [L*D, B, H] of mode "step"
    input_gradient: bool

    def to(self, dtype: torch.dtype) -> Work:
        """The same numbers in another dtype."""
        state = (self.state[0].to(dtype), self.state[1].to(dtype)) if self.state else None
        return replace(self, x=self.x.to(dtype), state=state)


@dataclass(frozen=True)
class Contender:
    """`call` does the work once; `results` does it from the start and names what came out."""

    call: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]


def unsuited(provider: str, case: Case, mode: str, dtype: torch.dtype) -> str | None:
    """Why `provider` has no part in this measurement; None if it has."""
    if mode == "step" and (case.D == 2 or case.packed):
        return "a stream has one direction and no lengths"
    if provider != "onnxruntime":
        return None
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if mode == "train":
        return "forward only"
    if case.packed:
        return "no packed sequences"
    if dtype != torch.float32:
        return "float32 only here"
    return None


def build(
    providers: Sequence[str],
    case: Case,
    mode: str,
    dtype: torch.dtype,
    input_gradient: bool = False,
    *,
    device: str = "cpu",
    eps: float | None = None,
    finish: Callable[[Contender], Contender] | None = None,
) -> dict[str, Contender]:
    """The contenders by name, checked against float64; raises Mismatch if one is off.

    `eps` is the spacing of the arithmetic at 1, where it is not that of `dtype`. `finish` makes
    another contender of each, before the check.
    """
    work = Work(mode, case.input(dtype).to(device), None, input_gradient)
    if mode == "step":
        half = torch.full((case.L, case.B, case.H), 0.5, dtype=dtype, device=device)
        work = replace(work, x=rows(work.x)[:1], state=(half, half))
    torch.manual_seed(0)
    arguments = (case.I, case.H, case.L)
    options = {"bidirectional": case.D == 2, "dtype": dtype, "device": device}
    peer = nn.LSTM(*arguments, **options)
    contenders = {}
    for name in providers:
        if name == "onnxruntime":
            contenders[name] = _onnx(peer, work)
        elif name == "torch":
            contenders[name] = _contender(peer, work)
        else:
            ours = fastlstm.LSTM(*arguments, **options)
            ours.load_state_dict(peer.state_dict())
            contenders[name] = _contender(ours, work)
    with torch.inference_mode(mode != "train"):
        if finish is not None:
            contenders = {name: finish(contender) for name, contender in contenders.items()}
        _check(contenders, peer, work, eps or torch.finfo(dtype).eps, f"{case.name}, {mode}")
    return contenders


def rows(y: Tensor | PackedSequence) -> Tensor:
    """The tensor that holds the rows, packed or not."""
    return y.data if isinstance(y, PackedSequence) else y


def _contender(module: nn.RNNBase, work: Work) -> Contender:
    if work.mode == "train":
        return _training(module, work)
    module.eval()

    def results() -> dict[str, Tensor]:
        y, (h, c) = module(work.x, work.state)
        return {"y": rows(y), "h": h, "c": c}

    carried = work.state

    def step() -> None:
        nonlocal carried
        _, carried = module(work.x, carried)

    return Contender(step if work.mode == "step" else lambda: module(work.x), results)


def _training(module: nn.RNNBase, work: Work) -> Contender:
    x = work.x
    leaves: dict[str, Tensor] = dict(module.named_parameters())
    if work.input_gradient:
        # A leaf of its own: contenders must not add up their gradients in one place.
        own = rows(x).clone().requires_grad_()
        x = x._replace(data=own) if isinstance(x, PackedSequence) else own
        leaves["x"] = own
    with torch.no_grad():
        shape = rows(module(x)[0]).shape
    targets = list(leaves.values())
    incoming = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(rows(x))

    def call() -> Tensor:
        for leaf in targets:
            leaf.grad = None
        y = rows(module(x)[0])
        y.backward(incoming)
        return y

    def results() -> dict[str, Tensor]:
        found = {"y": call().detach()}
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            found[f"gradient of {name}"] = leaf.grad
        return found

    return Contender(call, results)


def _onnx(lstm: nn.LSTM, work: Work) -> Contender:
    from . import onnx_peer

    x = rows(work.x)
    T, B, _ = x.shape
    session = onnx_peer.session(lstm, T, B, torch.get_num_threads())
    L, D = lstm.num_layers, 1 + lstm.bidirectional
    h0, c0 = work.state or (torch.zeros(L * D, B, lstm.hidden_size),) * 2
    start = {"x": x.numpy()}
    for k, (h, c) in enumerate(zip(h0.split(D), c0.split(D), strict=True)):
        start |= {f"h0_{k}": h.numpy(), f"c0_{k}": c.numpy()}
    states = [name for name in start if name != "x"]
    feed = dict(start)

    def results() -> dict[str, Tensor]:
        y, *pairs = (torch.from_numpy(array) for array in session.run(None, start))
        y = y.transpose(1, 2).flatten(2)  # [T, D, B, H] -> [T, B, D*H]
        return {"y": y, "h": torch.cat(pairs[::2]), "c": torch.cat(pairs[1::2])}

    def step() -> None:
        _, *carried = session.run(None, feed)
        feed.update(zip(states, carried, strict=True))

    return Contender(step if work.state else lambda: session.run(None, start), results)


def _check(
    contenders: dict[str, Contender], peer: nn.LSTM, work: Work, eps: float, where: str
) -> None:
    """Every result may be off float64 by twice as much as nn.LSTM is, plus one rounding."""

    def evaluate(dtype: torch.dtype) -> dict[str, Tensor]:
        sizes = (peer.input_size, peer.hidden_size, peer.num_layers)
        module = nn.LSTM(*sizes, bidirectional=peer.bidirectional, dtype=dtype)
        module.to(rows(work.x).device).load_state_dict(peer.state_dict())
        return _contender(module, work.to(dtype)).results()

    dtype = rows(work.x).dtype
    # float64 has no wider truth: there nn.LSTM's float32 error, scaled, is the yardstick.
    narrow = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(narrow).eps
    truth, yardstick = evaluate(torch.float64), evaluate(narrow)
    for name, contender in contenders.items():
        for what, got in contender.results().items():
            want = truth[what]
            bound = 2 * scale * (yardstick[what] - want).abs().max() + eps * want.abs().max()
            error = (got - want).abs().max()
            if not error <= bound:
                raise Mismatch(
                    f"{where}: {what} from {name} is off float64 by {error:.3g}; at most "
                    f"{bound:.3g} is right (twice the error of nn.LSTM, plus one rounding)"
                )
