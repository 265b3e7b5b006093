"""Between ``torch.nn`` and this library: the same parameters in another module.

A converted module holds the very same ``Parameter`` objects, so an optimizer that has them goes
on working and either module sees what the other learns. Everything else that the instance holds
comes along: training mode, buffers, hooks, parametrizations, ``weight_norm``, your own attributes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

__all__ = [
    "class_name",
    "convert",
    "joined_class",
    "obstacle",
    "original_class",
    "rebuild",
    "with_ours",
]

M = TypeVar("M", bound=nn.Module)
_SUBCLASS = "a subclass, whose own behaviour would be lost"
_OPTIONS = "_fastlstm_options"  # where a module of torch.nn keeps the settings that ours has
_PRIVATE = (
    "_caches",
    "_cache",
    "_names",
    "_layers",
    "_fast_settings",
    "_plain",
)  # every module of this library makes its own


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
    found = obstacle(source, target)
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


def obstacle(source: nn.Module, target: type[nn.Module]) -> str:
    """Say why a module cannot be rebuilt as an instance of target; "" if it can."""
    if "forward" in source.__dict__:
        return "its forward has been replaced on the instance"
    if source._compiled_call_impl is not None:
        return "it has been compiled: convert first, then compile"
    if any(getattr(hook, "with_module", 0) for hook in source._load_state_dict_pre_hooks.values()):
        return "it has a load_state_dict pre-hook that is bound to this very module"
    actual = original_class(source)
    held = {*source.__dict__, *source._parameters, *source._buffers, *source._modules}
    taken = sorted(
        name
        for name in held
        if name in _PRIVATE or (hasattr(target, name) and not hasattr(actual, name))
    )
    if taken and not _is_ours(actual):
        return f"fastlstm has another meaning for its {', '.join(taken)}"
    return ""


def _is_ours(kind: type[nn.Module]) -> bool:
    return any(base.__module__.startswith("fastlstm.") for base in kind.__mro__)


def rebuild(source: nn.Module, state: dict[str, Any], target: type[M]) -> M:
    """Return an instance of target that holds state, parametrized as source is."""
    actual = original_class(source)
    if _is_ours(actual):
        for private in _PRIVATE:
            state.pop(private, None)
        if not _is_ours(target):
            own = {name: value for name, value in state.items() if _is_option(name, actual)}
            state = {name: value for name, value in state.items() if name not in own}
            state |= {_OPTIONS: own} if own else {}
    else:
        state |= state.pop(_OPTIONS, {})
    if parametrize.is_parametrized(source):
        # Parametrizing gave source a class of its own, with a property for each parametrized
        # tensor; target gets one with the same properties.
        made = ("__module__", "__doc__", "_public")
        own = {k: v for k, v in vars(type(source)).items() if k not in made}
        target = type(f"Parametrized{target.__name__}", (target,), own)
        lists = nn.ModuleDict(dict(source.get_submodule("parametrizations").named_children()))
        state["_modules"] = {**state["_modules"], "parametrizations": lists}
    result = target.__new__(target)
    result.__setstate__(state)
    return result


def _is_option(name: str, kind: type[nn.Module]) -> bool:
    """Whether it is a setting that a class of this library has and ``torch.nn`` lacks."""
    return any(
        name in vars(base) and base.__module__.startswith("fastlstm.") for base in kind.__mro__
    )


def class_name(kind: type[nn.Module]) -> str:
    """Return how messages call a class: "nn.LSTM", "fastlstm.LSTM"."""
    package = "nn" if kind.__module__.startswith("torch.nn.") else kind.__module__.split(".")[0]
    return f"{package}.{kind.__qualname__}"


def with_ours(subclass: Any, kind: type[nn.Module], ours: Any) -> Any:
    """Return a subclass of both, which computes as ours does, or a sentence why there is none.

    A subclass of ``nn.LSTM`` that has a constructor of its own and more methods, but changes none
    that ``nn.LSTM`` has, computes what ``nn.LSTM`` computes, so ours may do it instead.

    Args:
        subclass: somebody's class.
        kind: the class of ``torch.nn`` that it inherits from.
        ours: the class of this library that replaces that one.
    """
    between = [base for base in subclass.__mro__ if base not in kind.__mro__]
    own = {name for base in between for name in vars(base)} - _OF_EVERY_CLASS
    changed = sorted(name for name in own if hasattr(kind, name) or hasattr(ours, name))
    if changed:
        return f"{_SUBCLASS}: it defines {', '.join(changed)}"
    if any(vars(base).get("__slots__") for base in between):
        return f"{_SUBCLASS}: it has __slots__"
    return _joined(subclass, ours)


class _Plain:
    """A class that defines nothing: what it has, Python gives to every class."""


# Annotations have these names, one or another in each Python, and some only once they are read.
_OF_EVERY_CLASS = {
    *vars(_Plain),
    *("__init__", "__slots__", "__annotations__", "__annotate_func__", "__annotations_cache__"),
}


@cache
def _joined(subclass: Any, ours: Any) -> Any:
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        subclass.__init__(self, *args, **options)
        self.__setstate__(self.__dict__)  # what the modules of this library make for themselves

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        return _new, (subclass, ours), self.__getstate__()

    names = {"__init__": __init__, "__reduce_ex__": __reduce_ex__, "_replaces": subclass}
    return joined_class(ours, subclass, subclass, names)


def joined_class(ours: Any, theirs: Any, like: Any, names: dict[str, Any]) -> Any:
    """Make a class that derives from both, and computes as ours does.

    Args:
        ours: a class of this library.
        theirs: a class of ``torch.nn``, or a subclass of it.
        like: which of them it is named after.
        names: what it has of its own.
    """
    shared = {name: getattr(like, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(theirs)(like.__name__, (ours, theirs), shared | names)


def _new(subclass: Any, ours: Any) -> Any:
    """Make an empty instance, for pickle and copy."""
    made = _joined(subclass, ours)
    return made.__new__(made)
