"""Tensors and modes that override PyTorch's functions override ours as well."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from fastlstm.layer.recorded import dispatch_modes

__all__ = ["overridable"]

Function = TypeVar("Function", bound=Callable[..., Any])


def overridable(function: Function) -> Function:
    """Let ``__torch_function__`` of a tensor's class, or of a mode, have the call as a whole.

    By default such a class gets outputs of the class, as from ``torch.lstm``. A mode sees one
    function, and not all that a call consists of.

    Args:
        function: takes the input, hx, the weights and keywords.
    """

    @wraps(function)
    def call(input: Any, hx: Any, weights: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():  # a compiler looks into the call
            states = hx if type(hx) is tuple else (hx,)
            tensors = (input, *states, *weights)
            if has_torch_function(tensors):
                return handle_torch_function(public, tensors, input, hx, weights, **options)
            mode = _fake_mode(tensors)
            if mode is not None:
                with mode:
                    return function(input, hx, weights, **options)
        return function(input, hx, weights, **options)

    public: Any = call
    return public


def _fake_mode(tensors: tuple[Any, ...]) -> Any:
    """Return the mode of a FakeTensor that is used outside of it, if there is one.

    Without it a kernel that got other tensors too returns these, with nothing written to them.
    """
    for t in tensors:
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            mode = getattr(t, "fake_mode", None)
            if mode is not None:
                return None if dispatch_modes() else mode
    return None
