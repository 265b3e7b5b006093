"""verify, tune, the record of both, and what auto makes of it."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlstm
from fastlstm import automatic, record, reference
from fastlstm.__main__ import main
from fastlstm.automatic import Size, first_without_doubt
from fastlstm.backends import choice
from fastlstm.kernels import base, measured
from fastlstm.kernels.base import Backend, get
from fastlstm.proof import verification
from fastlstm.record import OK, Record
from fastlstm.spec import DENSE, LayerSpec, Sequences, State

CPU = torch.device("cpu")
T, B, I, H = 4, 2, 3, 5
SPEC = LayerSpec("LSTM", I, H)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for records of this test alone."""
    monkeypatch.setenv("FASTLSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record, "_known", {})
    before = choice.name
    choice.set("auto")
    yield tmp_path / "cache"
    record._known.clear()
    monkeypatch.undo()
    choice.set(before)


# ---- five faults -----------------------------------------------------------------------------


class Faulty(Backend):
    """The reference with something wrong."""

    name = "faulty"
    devices = frozenset({"cpu"})

    def __init__(self, fault: Callable[..., Any]) -> None:
        self.layer = fault


def right(spec: Any, x: Tensor, weights: Any, state: Any, *rest: Any) -> Any:
    return reference.layer(spec, x, weights, state, *rest)


def wrong_gate_order(spec: Any, x: Tensor, weights: Any, state: Any, *rest: Any) -> Any:
    """TensorFlow's, i, g, f, o."""
    swapped = list(weights)
    for k, w in enumerate(weights):
        if w.shape[0] == 4 * spec.hidden_size:
            i, f, g, o = w.chunk(4)
            swapped[k] = torch.cat([i, g, f, o])
    return reference.layer(spec, x, swapped, state, *rest)


def unread_length(
    spec: Any, x: Tensor, weights: Any, state: Any, sequences: Any, *rest: Any
) -> Any:
    """That of the last row counts as T."""
    if sequences.lengths is not None:
        lengths = sequences.lengths.clone()
        lengths[-1] = x.shape[0]
        sequences = sequences._replace(lengths=lengths)
    return reference.layer(spec, x, weights, state, sequences, *rest)


def stale_state() -> Callable[..., Any]:
    """A call without a state goes on from the call before."""
    left: dict[Any, State] = {}

    def layer(spec: Any, x: Tensor, weights: Any, state: Any, *rest: Any) -> Any:
        key = spec, x.dtype
        start = left.get(key, state) if state.h is None else state
        found = reference.layer(spec, x, weights, start, *rest)
        left[key] = State(*(None if s is None else s.detach() for s in found[1]))
        return found

    return layer


def wrong_rounding(spec: Any, x: Tensor, weights: Any, state: Any, *rest: Any) -> Any:
    """Outputs go through bfloat16."""
    y, *more = reference.layer(spec, x, weights, state, *rest)
    return y.bfloat16().to(y.dtype), *more


def missing_gradient(spec: Any, x: Tensor, weights: Any, state: Any, *rest: Any) -> Any:
    """Of the second bias."""
    each = spec.weights_per_direction
    cut = [w.detach() if k % each == 3 else w for k, w in enumerate(weights)]
    return reference.layer(spec, x, cut, state, *rest)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dtype, and small problems."""
    monkeypatch.setattr(verification, "_DTYPES", (torch.float32,))
    every = verification.problems
    monkeypatch.setattr(verification, "problems", lambda **_: every(3, 3, 2, 4))


@pytest.mark.parametrize(
    ("fault", "feature"),
    [
        (wrong_gate_order, "plain"),
        (unread_length, "lengths"),
        (stale_state(), "packed"),
        (wrong_rounding, "plain"),
        (missing_gradient, "plain"),
        (right, None),
    ],
)
def test_verify_finds_each_fault(
    fault: Any, feature: str | None, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base._backends, "faulty", Faulty(fault))
    found = fastlstm.verify("cpu", "faulty")
    wrong = {verdict.feature for verdict in found if verdict.complaint}
    assert (feature in wrong) if feature else not wrong
    assert found.right == (feature is None)
    kept = record.load(CPU)
    assert kept is not None
    # Now auto knows: it takes what was right, were it the only one.
    monkeypatch.setattr(automatic, "_ON_CPU", (get("faulty"),))
    asked = Sequences(lengths=torch.tensor([1, 2])) if feature == "lengths" else DENSE
    if feature == "packed":
        asked = Sequences(batch_sizes=torch.tensor([2, 1]))
    taken = first_without_doubt("auto", torch.zeros(T, B, I), (SPEC,), asked)
    assert taken is (None if feature else get("faulty"))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_the_kernels_are_right(backend: str, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One regime of each; `python -m fastlstm verify` has all, and takes a minute."""
    if get(backend).error() is not None:
        pytest.skip(str(get(backend).error()))
    first = get(backend).trials(torch.empty(0))[:1]
    monkeypatch.setattr(type(get(backend)), "trials", lambda self, x: first)
    if backend == "triton":
        every = verification.problems
        monkeypatch.setattr(verification, "problems", lambda **_: every()[:3])
    found = fastlstm.verify("cpu", [backend], keep=False)
    assert found, "nothing was compared"
    assert found.right, repr(found)


def test_verify_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'gpu' is not a backend"):
        fastlstm.verify(backends="gpu")


# ---- the record ------------------------------------------------------------------------------


def keep(verdicts: Any = (), times: Any = ()) -> None:
    """Store a record of this machine."""
    assert (
        record.store(CPU, Record(dict(record.machine(CPU)), dict(verdicts), dict(times))) is None
    )
    choice.set(choice.name)


def key(training: bool = False, **other: Any) -> str:
    """The class of the shapes of these tests."""
    fields = {"spec": SPEC, "layers": 1, "size": (T, B), "dtype": torch.float32}
    more = {"packed": False, "training": training, "threads": torch.get_num_threads()}
    return record.shape_class(**(fields | more | other))  # type: ignore[arg-type]


def test_a_record_is_kept_shown_and_deleted(cache: Path, capsys: Any) -> None:
    assert record.load(CPU) is None
    keep({"cpu float32 long plain": "y is 3"}, {key(): {"torch": 1.0, "cpu": 2.5}})
    assert [path.suffix for path in cache.iterdir()] == [".json"]  # nothing else is left behind
    assert record.load(CPU) == record.known(torch.empty(0))
    assert main(["record", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "0 right, 1 wrong" in told
    assert "torch 1 µs, cpu 2.5 µs" in told
    assert main(["record", "--device", "cpu", "--delete"]) == 0
    assert not list(cache.iterdir())
    assert record.known(torch.empty(0)) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        b"\xff\xfe",
        '{"format": 2, "machine": {}, "verdicts": {}, "times": {}}',
        '{"format": 1, "machine": {"device": "another"}, "verdicts": {}, "times": {}}',
    ],
)
def test_an_unreadable_or_foreign_record_counts_for_nothing(content: Any, cache: Path) -> None:
    cache.mkdir()
    path = record._path(CPU)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert record.load(CPU) is None
    lstm = fastlstm.LSTM(I, H)
    assert fastlstm.explain(lstm, torch.zeros(T, B, I)).backend in ("cpu", "torch")


def test_another_version_is_another_record(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(times={key(): {"torch": 1.0}})
    changed = {**record.machine(CPU), "PyTorch": "3.0"}
    monkeypatch.setattr(record, "machine", lambda device: changed)
    assert record.load(CPU) is None


def test_wrong_times_in_a_record_count_for_nothing(cache: Path) -> None:
    keep()
    path = record._path(CPU)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "times": {key(): {"cpu": "fast"}}}))
    assert record.load(CPU) is None


def test_a_folder_that_cannot_be_written(cache: Path) -> None:
    """The record holds for the process; the reason is returned."""
    cache.write_text("a file in its place")
    found = record.store(CPU, Record(dict(record.machine(CPU)), {}, {key(): {"torch": 1.0}}))
    assert found is not None
    assert "cannot be written" in found
    assert record.known(torch.empty(0)) is not None


def test_where_records_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTLSTM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert record.folder() == tmp_path / "fastlstm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert record.folder() == tmp_path / ".cache" / "fastlstm"
    monkeypatch.setenv("HOME", "relative")
    assert record.folder() == Path(tempfile.gettempdir()) / "fastlstm"


# ---- auto obeys it ---------------------------------------------------------------------------

needs_cpu = pytest.mark.skipif(
    get("cpu").error() is not None, reason=f"the cpu kernels are missing: {get('cpu').error()}"
)


@needs_cpu
@pytest.mark.parametrize("winner", ["torch", "cpu"])
@pytest.mark.parametrize("training", [False, True])
def test_auto_takes_the_winner(winner: str, training: bool) -> None:
    """Of the class of shapes that was measured, and of no other."""
    slower = "cpu" if winner == "torch" else "torch"
    keep(times={key(training): {winner: 2.0, slower: 5.0}})
    theirs = nn.LSTM(I, H)
    lstm, x = fastlstm.LSTM.from_torch(theirs), torch.randn(T, B, I)
    with torch.set_grad_enabled(training):
        told = fastlstm.explain(lstm, x)
        assert told.backend == winner
        assert f"the record of this machine says {winner} 2 µs (1.00x), {slower} 5 µs (2.50x)" in (
            told.reason
        )
        if winner == "torch":
            assert torch.equal(lstm(x)[0], theirs(x)[0])
        torch.testing.assert_close(lstm(x)[0], theirs(x)[0])
        assert fastlstm.explain(lstm, torch.randn(T, 9 * B, I)).backend == "cpu"
        with fastlstm.backend("cpu"):  # who is named is taken
            assert fastlstm.explain(lstm, x).backend == "cpu"
    with torch.set_grad_enabled(not training):
        assert fastlstm.explain(lstm, x).backend == "cpu"


@needs_cpu
@pytest.mark.parametrize("training", [False, True])
def test_cells_can_be_sent_to_torch(training: bool) -> None:
    keep(times={key(training, layers=0, size=(1, B)): {"torch": 1.0, "cpu": 2.0}})
    theirs = nn.LSTMCell(I, H)
    cell, x = fastlstm.LSTMCell.from_torch(theirs), torch.randn(B, I)
    for grad in (training, not training):
        with torch.set_grad_enabled(grad):
            sent = grad == training
            assert fastlstm.explain(cell, x).backend == ("torch" if sent else "cpu")
            found = [module(x, module(x)) for module in (cell, theirs)]
            torch.testing.assert_close(*found)
            if grad:
                nodes = [type(h.grad_fn) for h, _ in found]
                assert (nodes[0] is nodes[1]) == sent
            if sent:
                assert all(map(torch.equal, *found))


@needs_cpu
def test_a_regime_that_fails_is_not_taken() -> None:
    keep({"cpu float32 short plain": "y is 3, float64 says 4"})
    lstm = fastlstm.LSTM(I, H)
    short, long = torch.randn(T, B, I), torch.randn(9, B, I)
    told = fastlstm.explain(lstm, short)
    assert told.backend == "torch"
    assert "verify has found the cpu kernels wrong here: y is 3, float64 says 4" in told.reason
    assert fastlstm.explain(lstm, long).backend == "cpu"
    assert fastlstm.explain(lstm, short, return_cell_states=True).backend == "reference"
    theirs = lstm.to_torch()
    with torch.no_grad():
        assert torch.equal(lstm(short)[0], theirs(short)[0])
    with fastlstm.backend("cpu"):
        lstm(short)


def on_gpu(monkeypatch: pytest.MonkeyPatch, found: Record | None) -> Any:
    """As much of a CUDA tensor as a choice looks at, with Triton kernels that can all."""
    monkeypatch.setattr(get("triton"), "obstacle", lambda spec, x: None)
    monkeypatch.setattr(get("triton"), "regime", lambda spec, T, B, x: "steps/steps")
    monkeypatch.setattr(measured, "capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    record._known["cuda", 0] = found
    device = torch.device("cuda")
    floating = {"is_floating_point": lambda: True, "requires_grad": False}
    return SimpleNamespace(
        is_cpu=False, is_cuda=True, device=device, dtype=torch.float32, **floating
    )


VERIFIED = {f"triton float32 steps/steps {name}": OK for name in ("plain", "reset", "lengths")}
RESET = Sequences(reset=torch.zeros(T, B, dtype=torch.bool))


def test_kernels_for_gpus_have_to_be_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken at once for what torch lacks, and for the rest once they are faster."""
    size = Size(1, T, B, ())
    shape = key(threads=0)

    def taken(found: Record | None, asked: Sequences = DENSE) -> str:
        x = on_gpu(monkeypatch, found)
        with torch.no_grad():
            backend = first_without_doubt("auto", x, (SPEC,), asked, size=size)
        return backend.name if backend else "reference"

    def kept(**fields: Any) -> Record:
        return Record({}, **fields)

    assert taken(None) == "torch"
    assert taken(None, RESET) == "reference"
    assert taken(kept(verdicts=VERIFIED)) == "torch"
    assert taken(kept(verdicts=VERIFIED), RESET) == "triton"
    fast = {shape: {"triton": 1.0, "torch": 2.0}}
    assert taken(kept(verdicts=VERIFIED, times=fast)) == "triton"
    assert taken(kept(times=fast)) == "torch"  # fast, and nobody knows whether it is right
    wrong = VERIFIED | {"triton float32 steps/steps plain": "y is 3"}
    assert taken(kept(verdicts=wrong, times=fast)) == "torch"
    assert taken(kept(verdicts=wrong), RESET) == "reference"
    assert taken(kept(times={shape: {"no such backend": 1.0}})) == "torch"


@needs_cpu
def test_a_record_costs_quick_calls_nothing_unless_it_prefers_others() -> None:
    keep({"cpu float32 long plain": OK}, {key(): {"cpu": 1.0, "torch": 2.0}})
    assert choice.asks is None
    keep({"cpu float32 long plain": "y is 3"})
    assert choice.asks is not None
    keep({}, {key(): {"torch": 1.0, "cpu": 2.0}, "nonsense": {"torch": 1.0}})
    assert choice.asks is not None
    assert choice.fast is get("cpu")
    with fastlstm.backend("cpu"):
        assert choice.asks is None


@needs_cpu
def test_a_record_costs_other_calls_hardly_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor calls that are smaller than those that it gives to others: nobody names their shape."""
    large = {key(training=True, size=(64, 64)): {"torch": 1.0, "cpu": 2.0}}
    keep({}, large | {"LSTM T<=1 B<=1": {"torch": 1.0}})
    monkeypatch.setattr(record, "shape_class", lambda *_: pytest.fail("it was named"))
    for module in (
        fastlstm.LSTM(I, H),
        fastlstm.LSTM(I, H + 1),
        fastlstm.LSTMCell(I, H),
        fastlstm.RNN(I, H),
    ):
        x = torch.randn(B, I) if isinstance(module, fastlstm.LSTMCell) else torch.randn(T, B, I)
        module(x)
    with torch.no_grad():
        fastlstm.LSTM(I, H)(torch.randn(64, 64, I))


@needs_cpu
@pytest.mark.parametrize("kind", ["LSTM", "batch_first", "RNN", "LSTMCell"])
@pytest.mark.parametrize("training", [False, True])
def test_plain_calls_obey_the_record(
    kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call, of any shape, also after the record or the number of threads has changed."""
    cell, first = kind == "LSTMCell", kind == "batch_first"
    options: Any = {"batch_first": True} if first else {}
    module = getattr(fastlstm, "LSTM" if first else kind)(I, H, **options)
    seen = []
    for name in ("stack", "cell"):
        function = getattr(get("torch"), name)
        monkeypatch.setattr(
            get("torch"), name, lambda *a, f=function: (seen.append("torch"), f(*a))[1]
        )

    def torch_takes(steps: int, batch: int) -> bool:
        seen.clear()
        shape = (batch,) if cell else (batch, steps) if first else (steps, batch)
        for _ in range(2):  # the second time from memory
            module(torch.randn(*shape, I))
        assert len(seen) in (0, 2)
        return bool(seen)

    def record_of(steps: int, batch: int) -> dict[str, dict[str, float]]:
        size = Size(0 if cell else 1, steps, batch, tuple(module.parameters()))
        return {size.key(torch.empty(0), module.specs()[0], DENSE): {"torch": 1.0, "cpu": 2.0}}

    with torch.set_grad_enabled(training):
        assert not torch_takes(1, 2)
        keep({}, record_of(1, 2))
        assert torch_takes(1, 2)
        assert not torch_takes(1, 4)
        with fastlstm.backend("cpu"):
            assert not torch_takes(1, 2)
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        assert not torch_takes(1, 2)
        torch.set_num_threads(before)
        assert torch_takes(1, 2)
        keep({}, record_of(1, 4))
        assert torch_takes(1, 4)
        assert not torch_takes(1, 2)
        if not cell:
            assert not torch_takes(4, 1)


@needs_cpu
@pytest.mark.parametrize("verdicts", [{}, {"cpu float32 short plain": "y is 3"}])
def test_what_records_a_call_obeys_verdicts_alone(verdicts: Any) -> None:
    """A trace, an export and a transform are for any T and B."""
    keep(verdicts, {key(): {"torch": 1.0, "cpu": 2.0}})
    lstm, x, longer = fastlstm.LSTM(I, H), torch.randn(T, B, I), torch.randn(T + 5, B, I)
    wanted = lstm(longer)[0]
    traced = torch.jit.trace(lstm, x, check_trace=False)
    torch.testing.assert_close(traced(longer)[0], wanted)
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(lstm, (x,), dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(longer)[0], wanted)
    torch.testing.assert_close(torch.func.vmap(lstm)(longer[None])[0][0], wanted)


@needs_cpu
def test_a_frozen_module_is_not_in_training() -> None:
    keep({}, {key(training=True): {"torch": 1.0, "cpu": 2.0}})
    lstm, x = fastlstm.LSTM(I, H), torch.randn(T, B, I)
    theirs = lstm.to_torch()
    assert torch.equal(lstm(x)[0], theirs(x)[0])
    lstm.requires_grad_(False)
    with fastlstm.backend("cpu"):
        ours = lstm(x)[0]
    assert torch.equal(lstm(x)[0], ours)
    assert torch.equal(lstm(x.requires_grad_())[0], theirs(x)[0])


@needs_cpu
def test_auto_without_a_record_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices do not depend on what is measured, and a call looks for no file."""
    lstm, x = fastlstm.LSTM(I, H), torch.randn(T, B, I)
    lstm(x)
    monkeypatch.setattr(record, "load", lambda device: pytest.fail("a record was read"))
    assert choice.fast is get("cpu")
    with torch.no_grad():
        lstm(x)
    lstm(x)


# ---- tune ------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures hardly at all."""
    monkeypatch.setattr("fastlstm.proof.tuning._SECONDS", 1e-9)
    monkeypatch.setattr("fastlstm.proof.tuning._ROUNDS", 1)


@needs_cpu
@pytest.mark.parametrize("kind", ["LSTM", "RNN", "LSTMCell"])
def test_tune_keeps_times(kind: str, hasty: None) -> None:
    module = getattr(fastlstm, kind)(I, H)
    x = torch.randn(B, I) if kind == "LSTMCell" else torch.randn(T, B, I)
    found = fastlstm.tune(module, x)
    assert len(found) == 2  # inference and training
    assert all(set(timing.times) == {"cpu", "torch"} for timing in found)
    assert "training" in repr(found).splitlines()[1]
    kept = record.load(CPU)
    assert kept is not None
    assert kept.times == dict(found)
    told = fastlstm.explain(module, x)
    assert told.backend == kept.winner(found[1].shape)
    assert all(p.grad is None for p in module.parameters())


@needs_cpu
def test_tune_without_a_choice(hasty: None) -> None:
    assert not fastlstm.tune(fastlstm.LSTM(I, H, peephole=True), torch.randn(T, B, I))
    with pytest.raises(TypeError, match="from_torch"):
        fastlstm.tune(nn.LSTM(I, H), torch.randn(T, B, I))  # type: ignore[arg-type]


@needs_cpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_tuned_backend_measures_a_new_shape_once(packed: bool, hasty: None) -> None:
    lstm = fastlstm.LSTM(I, H)
    x: Any = torch.randn(T, B, I)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 1]))
    with fastlstm.backend("tuned"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                lstm(x)
        kept = record.load(CPU)
        assert kept is not None
        assert len(kept.times) == 2
        lstm(x)
        assert record.load(CPU) == kept
        assert fastlstm.explain(lstm, x).reason.startswith("tuned: ")


# ---- the command, and the trap ---------------------------------------------------------------


def test_the_command(cache: Path, quick: None, hasty: None, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    assert "verify" in capsys.readouterr().out
    assert main(["record", "--device", "cpu"]) == 0
    assert main([]) == 0
    assert "nothing is known of this machine" in capsys.readouterr().out
    if get("cpu").error() is None:
        assert main(["verify", "--device", "cpu", "--backend", "cpu"]) == 0
        assert "0 wrong" in capsys.readouterr().out
        assert main(["tune", "3,5,1,2,2,4", "3,5,0,1,2,1", "torch.nn:Identity,1,1"]) == 2
        assert "there is no LSTM" in capsys.readouterr().err
        kept = record.load(CPU)
        assert kept is not None
        assert len(kept.times) == 4
    for wrong in ("3,5", "3,5,1,1,1,x", "torch.nn:Identity,1"):
        assert main(["tune", wrong]) == 2
        assert "expected" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["record", "--device", "cuda"]) == 2
    assert main(["tune", "3,5,1,1,1,1", "--dtype", "short"]) == 2
    capsys.readouterr()
    for wrong in (["--device", "nope"], ["--backend", "nope"]):
        assert main(["verify", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@needs_cpu
def test_the_trap_for_silent_wrongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "CHECKED", True)
    choice.set("auto")
    lstm, x = fastlstm.LSTM(I, H, 2, bidirectional=True), torch.randn(T, B, I)
    calls: list[dict[str, Any]] = [{}, {"lengths": torch.tensor([3, 0])}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in (*calls, {"return_cell_states": True}):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    lstm(x, **options)
    fastlstm.LSTMCell(I, H)(x[0])
    forward = get("cpu").lstm_plain_fwd

    def wrong(*arguments: Any) -> Any:
        y, *rest = forward(*arguments)
        y[2, 1, 3] += 1e-3
        return y, *rest

    monkeypatch.setattr(get("cpu"), "lstm_plain_fwd", wrong)
    with pytest.raises(RuntimeError, match=r"FASTLSTM_CHECK: y\[2, 1, 3\] is .* by cpu, .* torch"):
        lstm(x)
