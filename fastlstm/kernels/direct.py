"""Plain calls of the CPU kernels without an operator: what csrc/bindings/direct.cpp needs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["infer_functions"]

# In the order of csrc/bindings/python.h.
_FUNCTIONS = (
    "PyTuple_New", "PyTuple_SetItem", "PyTuple_Size", "PyTuple_GetItem", "PyObject_Type",
    "Py_IncRef", "Py_DecRef", "PyLong_AsLong", "PyObject_CallObject", "PyErr_Clear",
    "PyEval_SaveThread", "PyEval_RestoreThread",
)  # fmt: skip


def infer_functions(make: Any) -> list[Callable[..., Any] | None]:
    """Return what computes plain calls without an operator: of float weights, of quantised ones.

    The first takes ``(weights, x, hx, layers, directions, caches, low)``: tuples of tensors, hx
    None for zeros; of no layers it is a step of a cell; low: whether an address below 4 GB may be
    that of memory. It returns ``(y, (h_n, c_n))``, of a cell ``(h, c)``, and None for whatever it
    does not take, be that wrong or only unusual.

    The second takes ``(weights, x, hx, config, low)``, config being the seven arguments of
    ``quantized_infer_cpu`` that are numbers; 2-D x is a step of a cell. The hx of an RNN is
    ``(h_0,)``, and its result ``(y, h_n)``.

    Args:
        make: the operator that makes them, ``cpu_direct``.

    Returns:
        The functions; None for both where Python or torch lack what they need.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    api: Any = getattr(ctypes, "pythonapi", None)
    if capsule is None or api is None:
        return [None, None]
    pointer, python = ctypes.c_void_p, ctypes.py_object
    of_capsule = ctypes.PYFUNCTYPE(pointer, python, ctypes.c_char_p)
    exchange = of_capsule(("PyCapsule_GetPointer", api))(capsule, b"dlpack_exchange_api")
    addresses = [ctypes.cast(getattr(api, name), pointer).value for name in _FUNCTIONS]
    known = None, False, Tensor, nn.Parameter, Tensor.is_neg
    methods = make([*addresses, *map(id, known), exchange])
    new_function = ctypes.PYFUNCTYPE(python, pointer, pointer, pointer)
    new = new_function(("PyCFunction_NewEx", api))
    return [new(method, None, None) for method in methods] or [None, None]
