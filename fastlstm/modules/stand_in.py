"""To be taken for a module of ``torch.nn``: by ``isinstance``, TorchScript, fx, old exporters.

``torch.compile(fullgraph=True)`` refuses every ``nn.LSTM``, so the modules of this library are of
classes that do not derive from it. Other people's code asks ``isinstance(module, nn.LSTM)``, and
must get the answer True: the module does all that an ``nn.LSTM`` does. ``isinstance`` believes
``module.__class__`` where ``type(module)`` does not help (mocks live by that), and here it is a
class which derives from both.

PyTorch's own code is told the true class. It makes subclasses of it and puts them in its place
(parametrizations, FSDP2), and looks whether there is something to refuse.
"""

from __future__ import annotations

import copyreg
import sys
from typing import Any

import torch
from torch import nn

from fastlstm.convert import joined_class

__all__ = ["StandIn", "drawn"]

_make_empty: Any = copyreg._reconstructor  # type: ignore[attr-defined]
# It answers isinstance for the code that is compiled.
_ASKS_FOR_OTHERS = "torch._dynamo.variables.builtin"


def _public_class(self: Any) -> type:
    """What ``module.__class__`` is."""
    actual: Any = type(self)
    frame = sys._getframe().f_back
    asker = frame.f_globals.get("__name__") or "" if frame else ""
    if asker.startswith("torch.") and asker != _ASKS_FOR_OTHERS:
        return actual
    if "_public" not in vars(actual):
        actual._public = _derive(actual)
    return vars(actual)["_public"]


def _set_class(self: Any, value: Any) -> None:
    """Give a module another class; the true one where somebody gives back what he was told."""
    object.__dict__["__class__"].__set__(self, vars(value).get("_true", value))


def _derive(actual: Any) -> Any:
    """Make a class that derives from a class of this library and from that of ``torch.nn``."""
    hooked = hasattr(actual.__init_subclass__, "__func__") or type(actual) is not type
    if hooked or issubclass(actual, actual.torch_class):  # it would notice, or there is no need
        return actual

    def __new__(cls: Any, *args: Any, **options: Any) -> Any:
        return actual(*args, **options) if cls is public else object.__new__(cls)

    names = {"__new__": __new__, "_true": actual}
    public: Any = joined_class(actual, actual.torch_class, actual, names)
    return public


class StandIn:
    """A module that is taken for a :attr:`torch_class`, which has the same parameters."""

    torch_class: type[nn.Module]
    """The class of ``torch.nn``; a module has a method ``to_torch`` that returns one."""

    to_torch: Any
    __class__ = property(_public_class, _set_class)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Pickle's own way compares the class with what `__class__` says.
        return _make_empty, (type(self), object, None), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what ``torch.jit.script`` compiles, and puts in the place of this module."""
        return self.to_torch()

    def _slow_forward(self, *args: Any, **options: Any) -> Any:
        """Compute a call that ``torch.jit`` traces; ``nn.Module`` calls no other here."""
        if _exports_by_trace():
            return _by_torch(self, args, options)
        return nn.Module._slow_forward(self, *args, **options)  # type: ignore[arg-type]


def _exports_by_trace() -> bool:
    """Whether the old exporter of ONNX is at work, which knows PyTorch's own operators only."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def _by_torch(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute a call by the module of ``torch.nn``.

    The exporter passes the defaults of all arguments, those that only keywords can set too, and
    makes a tensor of False.
    """
    more = [value for value in (*args[2:], *options.values()) if value is not None]
    if any(value is not False and (value.dim() > 0 or bool(value)) for value in more):
        raise RuntimeError(
            "torch.onnx.export(dynamo=False) knows what nn.LSTM and nn.RNN have, not lengths, "
            "reset or return_cell_states: use dynamo=True"
        )
    return module.to_torch().forward(*args[:2])


def drawn(
    module: nn.Module, values: tuple[Any, Any], keywords: dict[str, Any] | None = None
) -> Any:
    """Return the node that stands for this call in a graph that ``torch.fx`` draws.

    ``torch.fx.symbolic_trace`` calls modules with proxies. Those of ``torch.nn`` are nodes of the
    graph, by their name. So are these.

    Args:
        module: what is called.
        values: the input and hx.
        keywords: the others.

    Returns:
        The proxy of the node; None for a call that nobody draws.
    """
    if torch.compiler.is_compiling():
        return None
    x, hx = values
    states = hx if isinstance(hx, tuple | list) else (hx,)
    proxies = [value for value in (x, *states) if isinstance(value, torch.fx.Proxy)]
    if not proxies:
        return None
    tracer: Any = proxies[0].tracer
    given = {name: v for name, v in (keywords or {}).items() if v is not None and v is not False}
    args = (x,) if hx is None else (x, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)
