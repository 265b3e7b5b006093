"""Builds the emulator of the CUDA kernels, for the first test that needs it."""

import subprocess
import sys
from pathlib import Path

from filelock import FileLock

import fastlstm

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "fastlstm/_emulator.so"


def build() -> None:
    """Compile csrc/cuda for the CPU, unless that is done; processes of one run wait for the first.

    If it fails, setup.py leaves the reason where fastlstm.extension reads it.
    """
    if Path(fastlstm.__file__).parent != LIBRARY.parent:  # an installed wheel is tested
        return
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build/emulator.lock"):
        if not _is_new():
            command = [sys.executable, "setup.py", "-q", "build_emulator"]
            subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _is_new() -> bool:
    """Whether the library is newer than everything that it may be made of."""
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]
    newest = max(source.stat().st_mtime for source in sources if source.is_file())
    return LIBRARY.exists() and LIBRARY.stat().st_mtime > newest
