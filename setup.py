"""Builds the C++ kernels: csrc/ -> fastlstm/_C.so, a library for torch.ops.load_library.

Without torch or a working compiler the install still succeeds, on the reference backend: the
reason goes to the terminal and to fastlstm/_build_error.txt, which fastlstm.backends() quotes.
FASTLSTM_REQUIRE_EXTENSION=1 makes it an error.
"""

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Only the FMAs that the kernels spell out: the same bits from every compiler.
    *("-ffp-contract=off", "-fno-math-errno"),
    # LibTorch's stable ABI: one build for every torch >= 2.10.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]

# Each source with its own flags; csrc/cpu/dispatch.cpp chooses an instruction set at run time. The
# order is that of linking: of an inline function that several files define the linker keeps the
# first copy, so one compiled for a newer CPU must not come before one that runs everywhere.
SOURCES = {
    "csrc/bindings.cpp": [],
    "csrc/cpu/dispatch.cpp": [],
    "csrc/cpu/portable.cpp": [],
}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-DFASTLSTM_X86=1")
    # The last two: GCC 12 suspects its own intrinsics of using unset values.
    avx512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    avx512 += " -Wno-uninitialized -Wno-maybe-uninitialized"
    SOURCES["csrc/cpu/avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c"]
    SOURCES["csrc/cpu/avx512.cpp"] = avx512.split()


class BuildError(Exception):
    """Why there is no library: a first line for the terminal, then the compiler's own words."""


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        sys.stderr.write(done.stderr)  # warnings
    except OSError as error:
        raise BuildError(
            f"the C++ compiler {command[0]!r} cannot be run ({error.strerror}): install g++ or "
            "clang++, or name one in the environment variable CXX"
        ) from error
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), "no message")
        raise BuildError(
            f"{command[0]} failed: {first}\n\n$ {shlex.join(command)}\n{error.stderr[:4000]}"
        ) from error


def compile_library(library: Path, scratch: Path) -> None:
    torch = importlib.util.find_spec("torch")  # found, not imported: only its headers are needed
    if torch is None or torch.origin is None:
        raise BuildError(
            "torch is not visible to the build: install torch first, then run "
            "pip install with --no-build-isolation"
        )
    torch_root = Path(torch.origin).parent
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    include = ["-Icsrc", "-isystem", str(torch_root / "include")]

    def compile_source(source: str) -> str:
        target = scratch / Path(source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*compiler, *FLAGS, *SOURCES[source], *include, "-c", source, "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, SOURCES))
    # `import torch` does not make its symbols global, so the library has to name the one that has
    # them; that one is in memory by then, hence no search path.
    link = ["-shared", f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    if sys.platform == "linux":
        link.append("-Wl,-z,defs")  # a missing symbol fails here and not in the user's first call
    library.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler, *objects, *link, "-o", str(library)])


def tell_user(message: str) -> None:
    try:
        with open("/dev/tty", "w") as terminal:  # pip hides what a build prints
            terminal.write(message)
    except OSError:
        sys.stderr.write(message)


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # not tied to one version of Python

    def run(self) -> None:
        library = Path("" if self.inplace else self.build_lib, "fastlstm", "_C.so")
        report = library.with_name("_build_error.txt")
        library.unlink(missing_ok=True)  # an older library must not outlive a failed build
        report.unlink(missing_ok=True)
        try:
            compile_library(library, Path(self.build_temp))
        except BuildError as error:
            if os.environ.get("FASTLSTM_REQUIRE_EXTENSION") == "1":
                raise SystemExit(f"fastlstm: {error}") from error
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{error}\n")
            tell_user(
                "\nfastlstm: installed WITHOUT its C++ kernels, on the slower reference backend.\n"
                f"Reason: {str(error).splitlines()[0]}\n"
                f"More: fastlstm/{report.name}. Then install again.\n"
            )


setup(
    ext_modules=[
        Extension(
            "fastlstm._C",
            sources=list(SOURCES),
            depends=[str(header) for header in Path("csrc").rglob("*.h")],
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
