"""Runs compilers: what setup.py builds its libraries with.

A compiler says itself what it compiles for. So a cross compiler in CXX builds for another machine,
with the torch of that machine on PYTHONPATH: only headers and names of symbols are read from it.
"""

import hashlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class BuildError(Exception):
    """Why there is no library: a first line for the terminal, then the compiler's own words."""


class Absent(BuildError):
    """Nobody has to be told."""


class Recipe(NamedTuple):
    """How a library is built: `compiler` compiles each source with its flags, and links."""

    compiler: list[str]
    sources: dict[str, list[str]]
    link: list[str]
    strip: list[str]  # to link without the names of functions, which only developers need
    advice: str  # for whom the compiler cannot be run


class Target(NamedTuple):
    """What a compiler compiles for."""

    system: str  # "linux", "macos", "windows" or "other"
    machine: str  # "x86_64", "aarch64" or "other"
    gcc: bool  # whether the compiler is GCC, not one that says so too
    float16: bool  # whether it knows the type, and so the instructions


def torch_folder() -> Path:
    """Where torch is. It is not imported: only its headers are needed."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise BuildError(
            "torch is not visible to the build: install torch first, then run "
            "pip install with --no-build-isolation"
        )
    return Path(torch.origin).parent


def run(command: list[str], advice: str) -> str:
    """Run a command and return what it prints; what it warns of goes to stderr."""
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise BuildError(
            f"the compiler {command[0]!r} cannot be run ({error.strerror}): {advice}"
        ) from error
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), "no message")
        raise BuildError(
            f"{command[0]} failed: {first}\n\n$ {shlex.join(command)}\n{error.stderr[:4000]}"
        ) from error
    sys.stderr.write(done.stderr)
    return done.stdout


def target_of(compiler: list[str], advice: str) -> Target:
    """Ask the compiler which macros it defines."""
    macros = set(
        re.findall(r"#define (\w+)", run([*compiler, "-dM", "-E", "-x", "c++", "-"], advice))
    )
    systems = {"__linux__": "linux", "__APPLE__": "macos", "_WIN32": "windows"}
    system = next((name for macro, name in systems.items() if macro in macros), "other")
    machines = ("x86_64", "aarch64")
    machine = next((name for name in machines if f"__{name}__" in macros), "other")
    gcc = "__GNUC__" in macros and "__clang__" not in macros
    return Target(system, machine, gcc, "__FLT16_MANT_DIG__" in macros)


def compile_changed(command: list[str], target: Path, advice: str) -> None:
    """Run a command that compiles `target`, unless it and all that it reads are as last time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    dependencies, stamp = target.with_suffix(".d"), target.with_suffix(".stamp")
    known = all(file.exists() for file in (target, dependencies, stamp))
    if known and stamp.read_text() == digest(command, dependencies):
        return
    stamp.unlink(missing_ok=True)
    run([*command, "-MD", "-MF", str(dependencies)], advice)
    stamp.write_text(digest(command, dependencies))


def digest(command: list[str], dependencies: Path) -> str:
    """Of a command and of the content of every file that the compiler says it has read.

    The headers of torch and of the compiler are among them, so a new one of those compiles again.
    """
    found = hashlib.sha256(shlex.join(command).encode())
    names = dependencies.read_text().replace("\\\n", " ").partition(": ")[2]
    for name in re.findall(r"(?:\\.|\S)+", names):
        file = Path(
            re.sub(r"\\([ #$])", r"\1", name)
        )  # a space in a name has a backslash before it
        found.update(file.read_bytes() if file.exists() else b"")
    return found.hexdigest()
