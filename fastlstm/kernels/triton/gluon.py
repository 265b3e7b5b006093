"""What the kernels use of Gluon, Triton's explicit language; what differs between its versions.

A Triton without it, or with one that these kernels do not know, leaves :data:`PROBLEM` to say so,
and the plans leave out what is written in it. Triton's interpreter does not run Gluon.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import triton

__all__ = ["PROBLEM", "gl", "gluon", "mma_v2", "source_of"]

_HOME = "triton.experimental.gluon"


def _load() -> tuple[Any, Any, Any, str | None]:
    try:
        gluon = import_module(_HOME)
        language = import_module(f"{_HOME}.language")
        ampere = import_module(f"{_HOME}.language.nvidia.ampere")
        found = gluon, language, ampere.mma_v2
    except (ImportError, AttributeError) as error:
        reason = f"Triton {triton.__version__} has no Gluon that the kernels can use: {error}"
        return None, None, None, reason
    return (
        *found,
        "Triton's interpreter does not run Gluon" * triton.knobs.runtime.interpret or None,
    )


gluon, gl, mma_v2, PROBLEM = _load()


def source_of(kernel: Any) -> Any:
    """Return the class of the source of a kernel, for ``triton.compile``."""
    if not kernel.is_gluon():
        return triton.compiler.ASTSource
    return import_module(f"{_HOME}._runtime").GluonASTSource
