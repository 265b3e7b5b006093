"""What the kernels use of Gluon, Triton's explicit language; what differs between its versions.

A Triton without it, or with one that these kernels do not know, leaves :data:`PROBLEM` to say so,
and the plans leave out what is written in it. Triton's interpreter does not run Gluon.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import triton

__all__ = [
    *("CLUSTER_PROBLEM", "PROBLEM"),
    *("async_store", "block_barrier", "cluster", "gl", "gluon", "mbarrier", "mma_v2"),
    "source_of",
]

_HOME = "triton.experimental.gluon"
_CLUSTERS = 3, 9  # 3.8 has all names, but its mbarriers never end


def _load() -> tuple[Any, Any, Any, Any, str | None]:
    try:
        gluon = import_module(_HOME)
        language = import_module(f"{_HOME}.language")
        ampere = import_module(f"{_HOME}.language.nvidia.ampere")
        wait = language.barrier if hasattr(language, "barrier") else language.thread_barrier
        found = gluon, language, ampere.mma_v2, wait
    except (ImportError, AttributeError) as error:
        reason = f"Triton {triton.__version__} has no Gluon that the kernels can use: {error}"
        return None, None, None, None, reason
    return (
        *found,
        "Triton's interpreter does not run Gluon" * triton.knobs.runtime.interpret or None,
    )


def _load_hopper() -> tuple[Any, Any, Any, str | None]:
    if PROBLEM is not None:
        return None, None, None, PROBLEM
    try:
        hopper = import_module(f"{_HOME}.language.nvidia.hopper")
        found = hopper.async_store, hopper.cluster, hopper.mbarrier
    except (ImportError, AttributeError):
        return None, None, None, f"Triton {triton.__version__} sends nothing through a cluster"
    known = tuple(map(int, triton.__version__.split(".")[:2])) >= _CLUSTERS
    return *found, None if known else f"Triton {triton.__version__} counts arrivals otherwise"


gluon, gl, mma_v2, block_barrier, PROBLEM = _load()
async_store, cluster, mbarrier, CLUSTER_PROBLEM = _load_hopper()


def source_of(kernel: Any) -> Any:
    """Return the class of the source of a kernel, for ``triton.compile``."""
    if not kernel.is_gluon():
        return triton.compiler.ASTSource
    return import_module(f"{_HOME}._runtime").GluonASTSource
