"""Between ``torch.nn`` and this library: the same parameters in another module.

A converted module holds the very same ``Parameter`` objects, so an optimizer that has them goes
on working and either module sees what the other learns. Everything else that the instance holds
comes along: training mode, buffers, hooks, parametrizations, ``weight_norm``, your own attributes.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["class_name", "convert", "obstacle", "original_class", "rebuild", "with_additions"]

M = TypeVar("M", bound=nn.Module)
_SUBCLASS = "a subclass, whose own behaviour would be lost"
# What every class has, and what building an instance from its state does not need.
_UNIMPORTANT = {
    "__abstractmethods__", "__annotations__", "__dict__", "__doc__", "__firstlineno__", "__init__",
    "__module__", "__parameters__", "__qualname__", "__static_attributes__", "__weakref__",
    "_abc_impl",
}  # fmt: skip


def convert(source: nn.Module, kind: type[nn.Module], target: type[M]) -> M:
    """Return a module of class target with the parameters of source and all else that it holds.

    Hooks that are added to or removed from either module afterwards do not concern the other.

    Args:
        source: a module of exactly the class kind, parametrized or not.
        kind: the class that source must have.
        target: the class of the result; an instance of it must hold the same things as a kind.

    Raises:
        TypeError: source is something else, or a subclass, whose own behaviour would be lost.
        ValueError: source has something that cannot come along; the message says what.
    """
    actual = original_class(source)
    if actual is not kind:
        why = f", {_SUBCLASS}" if issubclass(actual, kind) else ""
        raise TypeError(f"expected a {class_name(kind)}, got a {class_name(actual)}{why}")
    found = obstacle(source)
    if found:
        raise ValueError(f"cannot convert this {class_name(kind)}: {found}")
    state = {
        name: value.copy() if isinstance(value, dict | list | set) else value
        for name, value in source.__dict__.items()
    }
    return rebuild(source, state, target)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without what parametrizing it has made of that."""
    return parametrize.type_before_parametrizations(module)


def obstacle(source: nn.Module) -> str:
    """Say why a module cannot be rebuilt as another class; "" if it can."""
    if "forward" in source.__dict__:
        return "its forward has been replaced on the instance"
    if source._compiled_call_impl is not None:
        return "it has been compiled: convert first, then compile"
    if any(getattr(hook, "with_module", 0) for hook in source._load_state_dict_pre_hooks.values()):
        return "it has a load_state_dict pre-hook that is bound to this very module"
    return ""


def rebuild(source: nn.Module, state: dict[str, Any], target: type[M]) -> M:
    """Return an instance of target that holds state, parametrized as source is."""
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


def class_name(kind: type[nn.Module]) -> str:
    """Return how messages call a class: "nn.LSTM", "fastlstm.LSTM"."""
    package = "nn" if kind.__module__.startswith("torch.nn.") else kind.__module__.split(".")[0]
    return f"{package}.{kind.__qualname__}"


@cache
def with_additions(subclass: Any, kind: Any, target: Any) -> Any:
    """Return a subclass of target with what subclass adds to kind, or why there is none.

    A subclass of ``nn.LSTM`` that has a constructor of its own and more methods, but changes none
    that ``nn.LSTM`` has, computes what ``nn.LSTM`` computes. So target can take its place, with
    these methods.

    Args:
        subclass: the class of the module that is to be replaced.
        kind: the class of ``torch.nn`` that it inherits from.
        target: what replaces that class.
    """
    own: dict[str, Any] = {}
    for base in reversed(subclass.__mro__):
        if base in kind.__mro__:
            continue
        own |= {name: value for name, value in vars(base).items() if name not in _UNIMPORTANT}
    changed = sorted(name for name in own if hasattr(kind, name) or hasattr(target, name))
    if changed:
        return f"{_SUBCLASS}: it defines {', '.join(changed)}"
    bound = sorted(name for name, value in own.items() if _names_its_class(value))
    if bound:
        return f"{_SUBCLASS}: {', '.join(bound)} calls super()"
    own |= {"__module__": subclass.__module__, "__doc__": subclass.__doc__}
    own |= {"_replaces": (subclass, kind), "__reduce_ex__": _reduce}
    result = type(subclass.__name__, (target,), own)
    result.__qualname__ = subclass.__qualname__
    return result


def _names_its_class(value: Any) -> bool:
    """Whether a member of a class refers to the class itself, as ``super()`` does."""
    value = getattr(value, "__func__", value)  # of static and class methods
    value = getattr(value, "fget", value)  # of properties
    return isinstance(value, types.FunctionType) and "__class__" in value.__code__.co_freevars


def _reduce(self: Any, protocol: int) -> Any:
    """Pickle and copy an instance of a class that :func:`with_additions` has made."""
    target = type(self).__mro__[1]
    return _restore_instance, (*self._replaces, target), self.__getstate__()


def _restore_instance(subclass: Any, kind: Any, target: Any) -> nn.Module:
    made: type[nn.Module] = with_additions(subclass, kind, target)
    return made.__new__(made)
