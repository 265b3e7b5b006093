"""``python -m fastlstm``: what there is on this machine, verify, tune, and the record of both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

import fastlstm
from fastlstm import record
from fastlstm.modules import LSTM, RNN, LSTMCell

__all__ = ["main"]

_TUNE = """\
Each WHAT is a shape, I,H,L,D,B,T (input size, hidden size, layers, directions, batch, steps; L = 0
is an LSTMCell), or a module of yours, PACKAGE.MODULE:NAME,B,T: a model, or a function that makes
one, whose LSTMs, RNNs and LSTMCells are timed for B sequences of T steps.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if all is well, 1 if something is wrong, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        torch.empty(0, device=_device(options))
    except (RuntimeError, AssertionError) as error:
        print(f"there is no device {options.device!r}: {_first_line(error)}", file=sys.stderr)
        return 2
    result: int = options.run(options)
    return result


def _first_line(error: BaseException) -> str:
    return f"{error}".partition("\n")[0].partition(". ")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastlstm",
        description="Without a command: the backends of this machine, and what is known of it.",
    )
    parser.set_defaults(run=_show, device=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare our kernels with float64 and PyTorch's")
    verify.add_argument("--backend", action="append", help="only this one; may be repeated")
    verify.add_argument("--no-record", action="store_true", help="keep nothing")
    verify.set_defaults(run=_verify)
    tune = commands.add_parser(
        "tune",
        help="time the backends for a shape",
        description="Time the backends, and let auto take the fastest from then on.",
        epilog=_TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_argument("what", nargs="+", metavar="WHAT", help="I,H,L,D,B,T or MODULE:NAME,B,T")
    tune.add_argument("--dtype", default="float32", help="of the numbers (float32)")
    tune.add_argument("--no-record", action="store_true", help="keep nothing")
    tune.set_defaults(run=_tune)
    shown = commands.add_parser("record", help="show or delete what is known of this machine")
    shown.add_argument("--delete", action="store_true", help="delete it")
    shown.set_defaults(run=_record)
    for command in (verify, tune, shown):
        command.add_argument("--device", help="cpu, cuda, cuda:1 ... (CUDA if there is one)")
    return parser


def _device(options: Any) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _show(options: Any) -> int:
    print(fastlstm.backends())
    found = record.load(_device(options))
    print(found or f"nothing is known of this machine in {record.folder()}: see verify and tune")
    return 0


def _verify(options: Any) -> int:
    keep = not options.no_record
    try:
        found = fastlstm.verify(_device(options), options.backend, keep=keep, verbose=True)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(repr(found).splitlines()[len(found)])
    _tell(found.note, keep and bool(found))
    return 0 if found.right else 1


def _tune(options: Any) -> int:
    keep, device = not options.no_record, _device(options)
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        print(f"{options.dtype!r} is not a floating dtype of torch", file=sys.stderr)
        return 2
    for what in options.what:
        try:
            calls = _calls(what, device, dtype)
        except (ValueError, ImportError, AttributeError) as error:
            print(f"{what}: {error}", file=sys.stderr)
            return 2
        for module, x in calls:
            found = fastlstm.tune(module, x, keep=keep)
            print(repr(found) or f"{what}: there is one candidate only, nothing to choose")
            _tell("", keep and bool(found) and not found.note)
    return 0


def _calls(what: str, device: torch.device, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """The modules that a WHAT stands for, each with an input."""
    place, colon, rest = what.partition(":")
    if colon:
        name, *numbers = rest.split(",")
        B, T = _numbers(numbers, "MODULE:NAME,B,T")
        made: Any = getattr(import_module(place), name)
        model = made if isinstance(made, nn.Module) else made()
        model = fastlstm.accelerate(model).to(device, dtype)
        modules = [m for m in model.modules() if isinstance(m, LSTM | RNN | LSTMCell)]
        if not modules:
            raise ValueError("there is no LSTM, RNN or LSTMCell in it")
    else:
        I, H, L, D, B, T = _numbers(what.split(","), "I,H,L,D,B,T")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        two = D == 2
        modules = [LSTM(I, H, L, bidirectional=two, **options) if L else LSTMCell(I, H, **options)]
    calls: list[tuple[Any, Any]] = []
    for module in modules:
        size = (B, T) if getattr(module, "batch_first", False) else (T, B)
        shape = (B,) if isinstance(module, LSTMCell) else size
        calls.append((module, torch.randn(*shape, module.input_size, device=device, dtype=dtype)))
    return calls


def _numbers(words: Sequence[str], form: str) -> list[int]:
    """The numbers at the end of a WHAT, or of all of it."""
    wanted = [each for each in form.split(",") if ":" not in each]
    if len(words) != len(wanted) or not all(word.isdecimal() for word in words):
        raise ValueError(f"expected {form}, where {', '.join(wanted)} are whole numbers")
    return [int(word) for word in words]


def _record(options: Any) -> int:
    device = _device(options)
    if options.delete:
        print("deleted" if record.forget(device) else "there was none")
        return 0
    print(record.load(device) or f"nothing is known of this machine in {record.folder()}")
    return 0


def _tell(note: str, kept: bool) -> None:
    """Say where the record is, or why it is not."""
    if note or kept:
        print(note or f"kept in {record.folder()}")


if __name__ == "__main__":
    sys.exit(main())
