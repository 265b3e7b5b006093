"""Compiles csrc/triton, what starts kernels that were compiled ahead, with a stand-in for CUDA.

The library registers its operators for CPU tensors then, and looks for the driver in the stand-in.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_stub import COMPILER, FLAGS, ROOT, TESTS

LIBRARY, DRIVER = "_triton.so", "libcuda_stub.so"


def library(folder: Path, *options: str) -> Path:
    """Build both into `folder`; skip the test where that cannot be done.

    Args:
        folder: for what is built.
        options: more flags for the compiler.
    """
    triton = pytest.importorskip("triton")  # which brings the driver's header
    if not shutil.which(COMPILER[0]):
        pytest.skip("there is no compiler")
    header = Path(triton.__file__).parent / "backends/nvidia/include"
    driver = folder / DRIVER
    run = [*COMPILER, *FLAGS, "-fvisibility=default", f"-I{header}", TESTS / "libcuda_stub.cpp"]
    subprocess.run([*run, "-shared", "-o", driver], check=True)
    # All in one, since most of the time goes to the headers of torch.
    sources = sorted((ROOT / "csrc/triton").glob("*.cpp"))
    together = folder / "triton.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    flags = [flag for flag in FLAGS if flag != "-DFASTLSTM_STUB"]
    flags += [f"-DFASTLSTM_STUB={driver}", *options]
    torch_libraries = [f"-L{Path(torch_folder()) / 'lib'}", "-ltorch_cpu", "-ldl", "-Wl,-zdefs"]
    target = folder / LIBRARY
    subprocess.run(
        [*COMPILER, *flags, together, "-shared", *torch_libraries, "-o", target], check=True
    )
    return target


def torch_folder() -> Path:
    """Where torch is."""
    import torch

    return Path(torch.__file__).parent
