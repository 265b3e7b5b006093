"""What Triton needs at the first call to build the part that starts its kernels."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

__all__ = ["problem"]


def problem() -> str | None:
    """Say what is missing: a C compiler or Python's headers; None if nothing is."""
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton has no C compiler: install gcc or clang, or name one in the variable CC"
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme has no headers; Triton looks there too.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return None if header.exists() else f"Triton needs Python's headers, and has no {header}"
