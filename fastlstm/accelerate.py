"""Swap the recurrent modules of a whole model, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules import rnn as torch_rnn  # torch.nn.LSTM may be replaced by ours

from fastlstm.convert import class_name, obstacle, original_class, rebuild, with_ours
from fastlstm.modules import LSTM, RNN, LSTMCell

__all__ = ["Patterns", "Swap", "accelerate", "restore", "swap"]

_log = logging.getLogger("fastlstm")
M = TypeVar("M", bound=nn.Module)
Patterns = str | Sequence[str] | None
_OURS: dict[type[nn.Module], Any] = {ours.torch_class: ours for ours in (LSTM, LSTMCell, RNN)}
_SCRIPTED = (
    "left, it is TorchScript: its forward is compiled, not Python. Build the model in Python and "
    "load the weights into it"
)
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


class Swap(NamedTuple):
    """What becomes of one module."""

    target: type[nn.Module] | None  # the class that takes its place, None where it stays
    line: str  # what to report, "" for a module that does not matter


def accelerate(
    model: M,
    verbose: bool = False,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    dry_run: bool = False,
) -> M:
    """Replace every ``nn.LSTM``, ``nn.LSTMCell`` and ``nn.RNN`` in a model, in place.

    The replacements share the parameters, and hooks can still be removed through the handles
    that were returned for them. A module that is registered in several places is replaced by one
    module. A reference that is not a submodule, such as a list of your own, stays as it is.

    An instance of a subclass is replaced if the class has only a constructor of its own and
    methods that its base lacks. What replaces it is an instance of that class too. Any other
    subclass is left, and so are modules that cannot be converted.

    What was replaced, what was left and why is logged to ``logging.getLogger("fastlstm")`` at
    level INFO, one line for each module.

    Args:
        model: any module.
        verbose: also print those lines.
        include: replace only modules whose path matches one of these patterns ("encoder.*"; the
            path is that of ``named_modules``, the patterns are those of :mod:`fnmatch`).
        exclude: leave modules whose path matches one of these.
        dry_run: print what would be replaced, and replace nothing.

    Returns:
        model itself, or its replacement if model is one of those itself.

    Raises:
        ValueError: a pattern of include or exclude matches no recurrent module.
    """
    return swap(model, _to_ours, "accelerate", verbose, (include, exclude), dry_run)


def restore(
    model: M,
    verbose: bool = False,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    dry_run: bool = False,
) -> M:
    """Replace every module of this library in a model by that of ``torch.nn``, in place.

    The way back from :func:`accelerate`: parameters are shared, hooks and attributes come along,
    and subclasses are what they were before. Modules that ``torch.nn`` cannot compute, such as an
    LSTM with layer normalisation, are left; the report says why.

    Args:
        model: any module.
        verbose: also print a line for each module.
        include: replace only modules whose path matches one of these patterns.
        exclude: leave modules whose path matches one of these.
        dry_run: print what would be replaced, and replace nothing.

    Returns:
        model itself, or its replacement if model is one of those itself.

    Raises:
        ValueError: a pattern of include or exclude matches no recurrent module.
    """
    return swap(model, _to_theirs, "restore", verbose, (include, exclude), dry_run)


def _rebuilt(module: nn.Module, target: type[nn.Module]) -> nn.Module:
    # The dictionaries of hooks are handed over, not copied: the handles refer to them.
    return rebuild(module, dict(module.__dict__), target)


def swap(
    model: M,
    plan: Callable[[nn.Module], Swap],
    verb: str,
    verbose: bool,
    patterns: tuple[Patterns, Patterns],
    dry_run: bool,
    build: Callable[[nn.Module, type[nn.Module]], nn.Module] = _rebuilt,
) -> M:
    """Replace what plan gives a target for, and report it.

    Args:
        model: any module.
        plan: says what becomes of a module.
        verb: the name of the function that was called.
        verbose: also print the report.
        patterns: include and exclude of that function.
        dry_run: report only.
        build: makes the replacement of a module, of the class that plan names. If it raises,
            nothing has been replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: expected a module, got {type(model).__name__}")
    chosen, left_out = map(_patterns, ("include", "exclude"), patterns)
    unused = {*(chosen or ()), *(left_out or ())}
    lines: list[str] = []
    replaced: dict[nn.Module, nn.Module] = {}
    for module, paths in _paths(model).items():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase | torch.jit.ScriptModule):
            unused -= {pattern for pattern in unused if _matches(paths, (pattern,))}
        target, line = plan(module)
        if not line:
            continue
        wanted = chosen is None or _matches(paths, chosen)
        if target is not None and (not wanted or _matches(paths, left_out or ())):
            target, line = None, "left, as include and exclude ask for"
        lines.append(f"{paths[0] or 'the model'}: {line}")
        if target is not None and not dry_run:
            replaced[module] = build(module, target)
    if unused:
        raise ValueError(
            f"{verb}: no recurrent module of this model matches {', '.join(sorted(unused))}"
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    _report(lines or [_nothing(verb)], verb, verbose or dry_run)
    result: Any = replaced.get(model, model)
    return result


def _report(lines: Sequence[str], verb: str, verbose: bool) -> None:
    for line in lines:
        _log.info("%s: %s", verb, line)
        if verbose:
            print(line)


def _nothing(verb: str) -> str:
    package = "fastlstm" if verb == "restore" else "nn"
    return f"no {package}.LSTM, {package}.LSTMCell or {package}.RNN in this model"


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All modules, each with the paths under which it is registered."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return found


def _patterns(name: str, patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not found or not all(isinstance(pattern, str) and pattern for pattern in found):
        raise ValueError(
            f"{name} must be a pattern of paths such as 'encoder.*', or several; got {patterns!r}"
        )
    return found


def _matches(paths: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def _to_ours(module: nn.Module) -> Swap:
    """What accelerate makes of a module."""
    if isinstance(module, torch.jit.ScriptModule):
        names = {kind.__name__ for kind in _OURS}
        return Swap(None, _SCRIPTED if module.original_name in names else "")
    actual: Any = original_class(module)
    if actual in (torch_rnn.GRU, torch_rnn.RNNCell, torch_rnn.GRUCell):
        return Swap(None, f"left, fastlstm has no {actual.__name__}")
    kind: Any = next((kind for kind in _OURS if issubclass(actual, kind)), None)
    if kind is None:
        return Swap(None, "")
    ours: Any = _OURS[kind]
    target = ours
    if actual is not kind:
        target = with_ours(actual, kind, ours)
        if isinstance(target, str):
            return Swap(None, f"left, it is a {class_name(actual)}, {target}")
    if problem := obstacle(module, target):
        return Swap(None, f"left, {problem}")
    return Swap(target, f"{class_name(actual)} -> {_described(ours, module)}")


def _to_theirs(module: nn.Module) -> Swap:
    """What restore makes of a module."""
    actual: Any = original_class(module)
    kind = next((kind for kind in _THEIRS if issubclass(actual, kind)), None)
    if kind is None:
        return Swap(None, "")
    target: type[nn.Module] = _THEIRS[kind]
    if "_replaces" in vars(actual):
        target = actual._replaces
    elif actual is not kind:
        return Swap(None, f"left, it is a {class_name(actual)}, a subclass of fastlstm's")
    if isinstance(module, LSTM) and (lacking := module.beyond_torch()):
        return Swap(None, f"left, nn.LSTM has no {', '.join(lacking)}")
    if problem := obstacle(module, target):
        return Swap(None, f"left, {problem}")
    return Swap(target, f"{_described(kind, module)} -> {class_name(target)}")


def _described(kind: type[nn.Module], module: nn.Module) -> str:
    return f"{class_name(kind)}({module.extra_repr()})"
