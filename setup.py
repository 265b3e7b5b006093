"""Builds the kernels: csrc/ -> libraries in fastlstm/, for torch.ops.load_library.

_C.so: of CPUs, and the plans of all. _cuda.so: of GPUs, where torch was built with CUDA and there
is an nvcc; a GPU need not be there. _triton.so, where torch was built with CUDA: what starts
Triton's kernels; with FASTLSTM_AHEAD=1 it is built in any case, and the installed Triton compiles
the kernels, for every GPU. _emulator.so: the CUDA kernels on a CPU, for tests, which build it by
`python setup.py build_emulator` when they need it (tests/emulator.py).

The install succeeds without any of them, on a slower backend. The reason goes to a file beside
them, which fastlstm.backends() quotes, and to the terminal, unless CUDA simply is not there.
FASTLSTM_REQUIRE_EXTENSION=1 makes it an error. FASTLSTM_CUDA=1 builds _cuda.so whatever torch was
built with, and makes it an error if that fails; FASTLSTM_CUDA=0 leaves it out.

Objects stay in build/objects. The next build compiles a source again if its command has changed,
or any file that the compiler read.

The libraries use the stable parts of LibTorch, and of CPython only what is handed to them at run
time (csrc/bindings/python.h). So one wheel serves every Python and every torch that pyproject.toml
allows.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

sys.path.insert(0, "csrc")
import elf
from toolchain import (
    Absent,
    BuildError,
    Recipe,
    compile_changed,
    run,
    target_of,
    torch_folder,
)

FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Only the FMAs that the kernels spell out: the same bits from every compiler.
    *("-ffp-contract=off", "-fno-math-errno"),
    # LibTorch's stable ABI: one build for every torch >= 2.10.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]

# Each source with its own flags; csrc/cpu/isa/dispatch.cpp chooses an instruction set at run time.
# The order is that of linking: of an inline function that several files define the linker keeps
# the first copy, so one compiled for a newer CPU must not come before one that runs everywhere.
SOURCES = {
    "csrc/bindings/call.cpp": [],
    "csrc/bindings/packed_weights.cpp": [],
    "csrc/bindings/passes.cpp": [],
    "csrc/bindings/forward.cpp": [],
    "csrc/bindings/backward.cpp": [],
    "csrc/bindings/infer.cpp": [],
    "csrc/bindings/direct.cpp": [],
    "csrc/bindings/training.cpp": [],
    "csrc/bindings/cell.cpp": [],
    "csrc/bindings/quantized.cpp": [],
    "csrc/bindings/plans.cpp": [],
    "csrc/bindings/register.cpp": [],
    "csrc/cuda/plan.cpp": [],
    "csrc/old_glibc.cpp": [],
    "csrc/cpu/cores.cpp": [],
    "csrc/cpu/pool.cpp": [],
    "csrc/cpu/usefulness.cpp": [],
    "csrc/cpu/isa/dispatch.cpp": [],
    "csrc/cpu/isa/portable.cpp": [],
    "csrc/cpu/quantized/dispatch.cpp": [],
    "csrc/cpu/quantized/portable.cpp": [],
}
# The last two: GCC 12 suspects its own intrinsics of using unset values.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
AVX512 += " -Wno-uninitialized -Wno-maybe-uninitialized"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
X86_SOURCES = {
    "csrc/cpu/isa/avx2.cpp": AVX2,
    "csrc/cpu/quantized/avx2.cpp": AVX2,
    "csrc/cpu/quantized/avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "csrc/cpu/isa/avx512.cpp": AVX512.split(),
    "csrc/cpu/isa/avx512bf16.cpp": [*AVX512.split(), "-mavx512bf16"],
    "csrc/cpu/isa/avx512fp16.cpp": [*AVX512.split(), "-mavx512fp16"],
    "csrc/cpu/quantized/avx512vnni.cpp": [*AVX512.split(), "-mavx512vnni"],
    "csrc/cpu/quantized/avx512bf16.cpp": [*AVX512.split(), "-mavx512vnni", "-mavx512bf16"],
    "csrc/cpu/quantized/avx512fp16.cpp": [*AVX512.split(), "-mavx512vnni", "-mavx512fp16"],
}
ARM_SOURCES = {
    "csrc/cpu/quantized/dotprod.cpp": ["-march=armv8.2-a+dotprod"],
    "csrc/cpu/quantized/i8mm.cpp": ["-march=armv8.2-a+dotprod+i8mm+bf16"],
}
# What SOURCES lack of a machine.
OF_MACHINE = {"x86_64": X86_SOURCES, "aarch64": ARM_SOURCES}
# These start first, in this order: each takes as long as all the others together. Of GCC's -O3
# they need loops in vectors; the rest makes them no faster, and takes a third of the time.
SLOWEST = [f"csrc/cpu/isa/{isa}.cpp" for isa in ("avx512", "avx2", "portable")]
GCC_SLOWEST = ["-O2", "-fvect-cost-model=dynamic"]

# The slowest first. Those of clusters need a GPU of compute capability 9.0.
CUDA_KERNELS = {
    "csrc/cuda/block.cu": 80,
    "csrc/cuda/grid.cu": 80,
    "csrc/cuda/cluster.cu": 90,
    "csrc/cuda/wide.cu": 90,
}
CUDA_HOST = ("csrc/cuda/bindings.cpp", "csrc/cuda/plan.cpp")
EMULATOR = tuple(
    f"csrc/cuda/emulator/{name}.cpp" for name in ("context", "schedule", "synchronise", "products")
)
GPUS = "8.0 9.0+PTX"  # +PTX: newer ones too
AHEAD_IS_WANTED = os.environ.get("FASTLSTM_AHEAD") == "1"
AHEAD = tuple(
    f"csrc/triton/{name}.cpp"
    for name in (
        "driver",
        "kernels",
        "tensors",
        "layer",
        "forward",
        "input_products",
        "backward",
        "weight_gradients",
        "register",
        "old_glibc",
    )
)

# Of a library on Linux. What is missing fails here, not in the first call; its threads may outlive
# whoever has loaded it. Before glibc 2.34 dlopen and dlsym are in a library of their own.
LINK_LINUX = ["-ldl", "-Xlinker", "-zdefs", "-Xlinker", "-znodelete"]
STRIP_LINUX = ["-Xlinker", "-s"]


class Library(NamedTuple):
    """A library, and what follows where it cannot be built."""

    name: str
    recipe: Callable[[], Recipe]
    report: str
    required: str  # what makes it an error
    loss: str = ""  # for the terminal

    def build(self, folder: Path, scratch: Path, pool: Executor, strip: bool) -> None:
        include = ["-Icsrc", "-isystem", str(torch_folder() / "include")]
        recipe = self.recipe()

        def compile_source(source: str) -> str:
            target = scratch / self.name / Path(source).with_suffix(".o")
            flags = [*recipe.sources[source], *include, "-c", source, "-o", str(target)]
            compile_changed([*recipe.compiler, *flags], target, recipe.advice)
            return str(target)

        sources = [source for source in SLOWEST if source in recipe.sources]
        sources += [source for source in recipe.sources if source not in SLOWEST]
        objects = dict(zip(sources, pool.map(compile_source, sources), strict=True))
        # `import torch` does not make its symbols global, so the library has to name the one that
        # has them; that one is in memory by then, hence no search path.
        torch = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
        target = str(folder / f"{self.name}.so")
        link = [*recipe.link, *(recipe.strip if strip else []), *torch]
        command = [*recipe.compiler, "-shared", *(objects[name] for name in recipe.sources)]
        run([*command, *link, "-o", target], recipe.advice)


def of_host(
    sources: dict[str, list[str]], of_machine: Mapping[str, dict[str, list[str]]] | None = None
) -> Recipe:
    """The recipe of C++ sources, each with flags of its own, and of those of the machine."""
    advice = "install g++ or clang++, or name one in the environment variable CXX"
    # On Windows clang too, because it has vector types; this driver takes the flags of the others.
    default = "clang++" if sys.platform == "win32" else "c++"
    compiler = shlex.split(os.environ.get("CXX", default), posix=sys.platform != "win32")
    if sys.platform == "darwin":
        compiler += shlex.split(os.environ.get("ARCHFLAGS", ""))  # -arch, of who builds wheels
    target = target_of(compiler, advice)
    flags, link, strip = FLAGS, ["-pthread"], []
    if target.system == "linux":
        link, strip = [*link, *LINK_LINUX], STRIP_LINUX
    elif target.system == "macos":
        link, strip = [*link, "-Wl,-rpath,@loader_path/../torch/lib"], ["-Wl,-x"]
    elif target.system == "windows":
        flags = [flag for flag in FLAGS if flag != "-fPIC"] + ["-D_CRT_SECURE_NO_WARNINGS"]
        link = ["-fuse-ld=lld"]
    sources = sources | (of_machine or {}).get(target.machine, {})
    if not target.float16:  # GCC 11
        sources = {name: own for name, own in sources.items() if "-mavx512fp16" not in own}
    if target.gcc:
        sources |= {name: [*sources[name], *GCC_SLOWEST] for name in SLOWEST if name in sources}
    return Recipe(
        compiler, {name: [*flags, *own] for name, own in sources.items()}, link, strip, advice
    )


def cpu() -> Recipe:
    recipe = of_host(SOURCES, OF_MACHINE)
    if "-zdefs" in recipe.link:
        recipe.link.extend(["-Xlinker", "--version-script=csrc/old_glibc.map"])
    return recipe


def ahead() -> Recipe:
    """Of what starts Triton's kernels, which needs no CUDA itself."""
    if not (AHEAD_IS_WANTED or torch_has_cuda()):
        raise Absent("torch was built without CUDA")
    if sys.platform != "linux":
        raise BuildError("Triton's kernels are for Linux")
    recipe = of_host({name: [] for name in (*AHEAD, "csrc/old_glibc.cpp")})
    recipe.link.extend(["-Xlinker", "--version-script=csrc/old_glibc.map"])
    return recipe


def compile_ahead(folder: Path) -> None:
    """Let the installed Triton compile the kernels for every GPU, which takes half an hour."""
    module = "fastlstm.kernels.triton.ahead"
    target = folder.joinpath(*module.split(".")[1:], "built")
    advice = "install triton of the version that the workflow of the wheels names, and torch"
    run([sys.executable, "-m", module, "build", str(target.resolve())], advice)


def emulator() -> Recipe:
    # The kernels unroll loops by a pragma of nvcc. -O2: less to wait for, and quick enough.
    flags = ["-O2", "-DFASTLSTM_EMULATE", "-Wno-unknown-pragmas", "-x", "c++"]
    return of_host(dict.fromkeys((*CUDA_KERNELS, *EMULATOR, *CUDA_HOST), flags))


def cuda() -> Recipe:
    """By nvcc, which has a compiler of the host for what is not of the GPU, and links cudart."""
    wanted = os.environ.get("FASTLSTM_CUDA")
    if wanted == "0":
        raise Absent("the CUDA kernels were left out of the build (FASTLSTM_CUDA=0)")
    if wanted != "1" and not torch_has_cuda():
        raise Absent("torch was built without CUDA; FASTLSTM_CUDA=1 builds its kernels anyway")
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    path = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes)]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(path))
    advice = "install the CUDA toolkit, or name its nvcc in the environment variable CUDACXX"
    if not nvcc:
        raise Absent(f"there is no nvcc to compile the CUDA kernels: {advice}")
    compiler = shlex.split(nvcc)
    host = shlex.split(os.environ.get("CXX", ""))
    if len(host) == 1:  # nvcc takes no more than a name
        compiler += ["-ccbin", *host]
    flags = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    sources = {
        source: [*flags, *options]
        for source, least in CUDA_KERNELS.items()
        if (options := architectures(least))
    }
    flags = ["-Xcompiler=" + ",".join(FLAGS)]
    if len(sources) < len(CUDA_KERNELS):
        flags.append("-DFASTLSTM_NO_CLUSTER")
    sources |= dict.fromkeys(CUDA_HOST, flags)
    link, strip = (LINK_LINUX, STRIP_LINUX) if sys.platform == "linux" else ([], [])
    return Recipe(compiler, sources, [*architectures(least=80), *link], strip, advice)


def torch_has_cuda() -> bool:
    """Whether torch was built with CUDA, by the file in which its build has written it down."""
    version = (torch_folder() / "version.py").read_text()
    return re.search(r"^cuda\b.*= *['\"]", version, re.MULTILINE) is not None


def architectures(least: int) -> list[str]:
    """nvcc's options for the GPUs of TORCH_CUDA_ARCH_LIST from capability `least` / 10 on."""
    options = []
    for word in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or GPUS):
        named = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if named is None:
            example = "write 8.0, 9.0a or 9.0+PTX"
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {word!r} for a GPU: {example}")
        capability = int(named[1] + named[2])
        gpu = f"{capability}{named[3]}"
        code = f"[sm_{gpu},compute_{gpu}]" if named[4] else f"sm_{gpu}"
        if capability >= least:
            options.append(f"-gencode=arch=compute_{gpu},code={code}")
    if least == 80 and not options:  # an older GPU next to newer ones is left to other backends
        raise BuildError("TORCH_CUDA_ARCH_LIST has no GPU from 8.0 on, which the kernels need")
    return options


def tell_user(message: str) -> None:
    try:
        with open("/dev/tty", "w") as terminal:  # pip hides what a build prints
            terminal.write(message)
    except OSError:
        sys.stderr.write(message)


# In the order in which they start: the slowest first.
LIBRARIES = [
    Library("_cuda", cuda, "_cuda_error.txt", "FASTLSTM_CUDA", "its CUDA kernels"),
    Library("_triton", ahead, "_triton_error.txt", "FASTLSTM_AHEAD"),
    Library(
        "_C",
        cpu,
        "_build_error.txt",
        "FASTLSTM_REQUIRE_EXTENSION",
        "its C++ kernels: PyTorch's own run instead",
    ),
]
EMULATOR_LIBRARY = Library(
    "_emulator", emulator, "_emulator_error.txt", "FASTLSTM_REQUIRE_EXTENSION"
)


class BuildLibraries(build_ext):
    targets: Sequence[Library] = LIBRARIES

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # not tied to one version of Python

    def run(self) -> None:
        folder = Path("" if self.inplace else self.build_lib, "fastlstm")
        folder.mkdir(parents=True, exist_ok=True)
        for library in self.targets:  # an older one must not outlive a failed build
            (folder / f"{library.name}.so").unlink(missing_ok=True)
            (folder / library.report).unlink(missing_ok=True)
        # Compilers share one pool; each library has a thread that waits for its own.
        with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor() as waiting:
            scratch = Path("build", "objects")  # pip throws self.build_temp away
            builds = [
                waiting.submit(each.build, folder, scratch, pool, not self.inplace)
                for each in self.targets
            ]
        for library, build in zip(self.targets, builds, strict=True):
            error = build.exception()
            if isinstance(error, BuildError):
                self.do_without(library, folder, error)
            elif error is not None:
                raise error
        if AHEAD_IS_WANTED:
            try:
                compile_ahead(folder)
            except BuildError as error:
                raise SystemExit(f"fastlstm: {error}") from error

    def do_without(self, library: Library, folder: Path, error: BuildError) -> None:
        if os.environ.get(library.required) == "1":
            raise SystemExit(f"fastlstm: {error}") from error
        (folder / library.report).write_text(f"{error}\n")
        if library.loss and not isinstance(error, Absent):
            tell_user(
                f"\nfastlstm: installed WITHOUT {library.loss}.\n"
                f"Reason: {str(error).splitlines()[0]}\n"
                f"More: fastlstm/{library.report}. Then install again.\n"
            )


class BuildEmulator(BuildLibraries):
    targets = (EMULATOR_LIBRARY,)

    def initialize_options(self) -> None:
        super().initialize_options()
        self.inplace = True


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """For every Python; for the platforms that have what the libraries need."""
        platform = super().get_tag()[2]
        files = (Path(self.bdist_dir or "") / f"fastlstm/{each.name}.so" for each in LIBRARIES)
        found = [elf.Library(file) for file in files if elf.is_elf(file)]
        return "py3", "none", elf.platform_tag(found) if found else platform


class Source(sdist):
    def make_distribution(self) -> None:
        """Pack everything that the build and the tests read."""
        self.filelist.extend(source_files())
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


def source_files() -> Iterator[str]:
    for folder in ("benchmarks", "csrc", "fastlstm", "tests", ".ci", ".github"):
        for path in Path(folder).rglob("*"):
            built = path.suffix in (".so", ".pyc") or path.name.endswith("_error.txt")
            built = built or path.parent.name == "built"
            if path.is_file() and not built:
                yield str(path)
    yield from ("CHANGELOG.md", "CONTRIBUTING.md")


def addresses() -> dict[str, str]:
    """Where the project lives: the repository whose workflow builds it."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")
    home = "/".join(os.environ.get(name, "") for name in names)
    if len(home) == 1:
        return {}
    pages = {"Homepage": "", "Documentation": "/blob/main/fastlstm/README.md"}
    pages |= {"Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}
    return {name: home + page for name, page in pages.items()}


setup(
    project_urls=addresses(),
    ext_modules=[
        Extension(
            "fastlstm._C",
            sources=[str(source) for source in Path("csrc").rglob("*.c*") if source.is_file()],
            depends=[str(header) for header in Path("csrc").rglob("*.h")],
        )
    ],
    cmdclass={
        "bdist_wheel": Wheel,
        "build_emulator": BuildEmulator,
        "build_ext": BuildLibraries,
        "sdist": Source,
    },
)
