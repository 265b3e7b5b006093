"""Between ``torch.nn`` and this library: the same parameters in another module.

A converted module holds the very same ``Parameter`` objects, so an optimizer that has them goes
on working and either module sees what the other learns. Everything else that the instance holds
comes along: training mode, buffers, hooks, parametrizations, ``weight_norm``, your own attributes.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["accelerate", "convert"]

_log = logging.getLogger("fastlstm")
M = TypeVar("M", bound=nn.Module)


def convert(source: nn.Module, kind: type[nn.Module], target: type[M]) -> M:
    """A module of class target with the parameters of source and all else that source holds.

    Hooks that are added to or removed from either module afterwards do not concern the other.

    Args:
        source: a module of exactly the class kind, parametrized or not.
        kind: the class that source must have.
        target: the class of the result; an instance of it must hold the same things as a kind.

    Raises:
        TypeError: source is something else, or a subclass, whose own behaviour would be lost.
        ValueError: source has something that cannot come along; the message says what.
    """
    actual = parametrize.type_before_parametrizations(source)
    if actual is not kind:
        why = f", {_SUBCLASS}" if issubclass(actual, kind) else ""
        raise TypeError(f"expected a {_name(kind)}, got a {_name(actual)}{why}")
    obstacle = _obstacle(source)
    if obstacle:
        raise ValueError(f"cannot convert this {_name(kind)}: {obstacle}")
    state = {
        name: value.copy() if isinstance(value, dict | list | set) else value
        for name, value in source.__dict__.items()
    }
    return _rebuild(source, state, target)


def accelerate(model: nn.Module, verbose: bool = False) -> Any:
    """Replace every ``nn.LSTM``, ``nn.LSTMCell`` and ``nn.RNN`` in a model, in place.

    The replacements share the parameters, and hooks can still be removed through the handles
    that were returned for them. A module that is registered in several places is replaced by one
    module. Subclasses and modules that cannot be converted are left as they are, and so is a
    reference that is not a submodule, such as a list of your own.

    What was replaced, what was left and why is logged to ``logging.getLogger("fastlstm")`` at
    level INFO, one line for each module.

    Args:
        model: any module.
        verbose: also print those lines.

    Returns:
        model itself, or its replacement if model is one of those itself.
    """
    lines: list[str] = []
    replaced: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules()):
        replacement, line = _replacement(module)
        if replacement is not None:
            replaced[module] = replacement
        if line:
            lines.append(f"{path or 'the model'}: {line}")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    for line in lines or ["no nn.LSTM, nn.LSTMCell or nn.RNN in this model"]:
        _log.info("accelerate: %s", line)
        if verbose:
            print(line)
    return replaced.get(model, model)


_SUBCLASS = "a subclass, whose own behaviour would be lost"


def _replacement(module: nn.Module) -> tuple[nn.Module | None, str]:
    """What should take the place of module, if anything, and what to report."""
    from fastlstm.modules import LSTM, RNN, LSTMCell  # it imports this file

    kinds: dict[type[nn.Module], type[nn.Module]] = {
        nn.LSTM: LSTM,
        nn.LSTMCell: LSTMCell,
        nn.RNN: RNN,
    }
    actual = parametrize.type_before_parametrizations(module)
    if actual in (nn.GRU, nn.RNNCell, nn.GRUCell):
        return None, f"left, fastlstm has no {actual.__name__}"
    if actual not in kinds:
        inherits = isinstance(module, nn.LSTM | nn.LSTMCell | nn.RNN)
        return None, f"left, it is a {_name(actual)}, {_SUBCLASS}" if inherits else ""
    obstacle = _obstacle(module)
    if obstacle:
        return None, f"left, {obstacle}"
    # The dictionaries of hooks are handed over, not copied: the handles refer to them.
    target = kinds[actual]
    replacement = _rebuild(module, dict(module.__dict__), target)
    return replacement, f"{_name(actual)} -> {_name(target)}({module.extra_repr()})"


def _obstacle(source: nn.Module) -> str:
    """Why source cannot be rebuilt as another class, empty if it can."""
    if "forward" in source.__dict__:
        return "its forward has been replaced on the instance"
    if source._compiled_call_impl is not None:
        return "it has been compiled: convert first, then compile"
    if any(getattr(hook, "with_module", 0) for hook in source._load_state_dict_pre_hooks.values()):
        return "it has a load_state_dict pre-hook that is bound to this very module"
    return ""


def _rebuild(source: nn.Module, state: dict[str, Any], target: type[M]) -> M:
    """An instance of target that holds state, parametrized as source is."""
    for private in ("_caches", "_cache", "_stream"):  # this library's modules make their own
        state.pop(private, None)
    if parametrize.is_parametrized(source):
        # Parametrizing gave source a class of its own, with a property for each parametrized
        # tensor; target gets one with the same properties.
        own = {k: v for k, v in vars(type(source)).items() if k not in ("__module__", "__doc__")}
        target = type(f"Parametrized{target.__name__}", (target,), own)
        lists = nn.ModuleDict(dict(source.get_submodule("parametrizations").named_children()))
        state["_modules"] = {**state["_modules"], "parametrizations": lists}
    result = target.__new__(target)
    result.__setstate__(state)
    return result


def _name(kind: type[nn.Module]) -> str:
    package = "nn" if kind.__module__.startswith("torch.nn.") else kind.__module__.split(".")[0]
    return f"{package}.{kind.__qualname__}"
