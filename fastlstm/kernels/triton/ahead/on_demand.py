"""Kernels that C++ starts, compiled by the installed Triton when each is first called.

They are those of :mod:`.keys`, where nothing was compiled when fastlstm was built: C++ starts
them in a fraction of the time that Triton's own launcher takes. Triton keeps what it has compiled
on the disk.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

from fastlstm.kernels.triton.gluon import CLUSTER_PROBLEM

from .compiling import compiled, interface
from .keys import Key, described, keys
from .plans import Row, table

__all__ = ["image", "kernels"]

_turn = threading.Lock()


def kernels(arch: int) -> tuple[list[dict[str, Any]], list[Row]]:
    """Return the kernels of a GPU of that compute capability, and the plans that take them.

    A kernel is described as in a manifest.
    """
    return [described(key, *interface(key)) for key in _keys(arch).values()], _plans(arch)


def _plans(arch: int) -> list[Row]:
    return table(arch, clusters=CLUSTER_PROBLEM is None)


@cache
def _keys(arch: int) -> dict[int, Key]:
    return {key.number: key for key in keys(_plans(arch))}


def image(arch: int, number: int) -> tuple[bytes, int]:
    """Compile a kernel, unless that was done before.

    Args:
        arch: compute capability of the GPU, 10 * major + minor.
        number: of the kernel, as ``Key.number``.

    Returns:
        the code, and the bytes of shared memory of a block.
    """
    with _turn:
        found = compiled(_keys(arch)[number], arch)
    return found.cubin, found.shared
