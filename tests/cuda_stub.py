"""Compiles the host's part of the CUDA kernels with a stub of the CUDA runtime, for tests."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlstm import extension

TESTS = Path(__file__).parent
ROOT = TESTS.parent
STUB = TESTS / "cudart_stub.cpp"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = [
    *("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DFASTLSTM_STUB"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{ROOT / 'csrc'}",
    *("-isystem", str(Path(torch.__file__).parent / "include")),
]


def compile_to(target: Path, source: Path, runtime: Path) -> Path:
    """Compile a source against the header of a runtime that is in that folder."""
    flags = [*FLAGS, f"-I{runtime}", "-c", source, "-o", target]
    subprocess.run([*COMPILER, *flags], check=True)
    return target


def host_library(folder: Path) -> Path:
    """Build the library into `folder`; skip the test where that cannot be done."""
    if sys.platform != "linux":
        pytest.skip("the CUDA kernels are for Linux")
    missing = extension.error() or (not shutil.which(COMPILER[0]) and "there is no compiler")
    if missing and os.environ.get("FASTLSTM_REQUIRE_EXTENSION") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    sources = [ROOT / "csrc/cuda/bindings.cpp", ROOT / "csrc/cuda/plan.cpp", STUB]
    objects = [compile_to(folder / f"{s.stem}.o", s, TESTS / "cudart") for s in sources]
    library = folder / "host.so"
    link = ["-shared", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-Wl,-zdefs"]
    subprocess.run([*COMPILER, *objects, *link, "-o", library], check=True)
    return library
