"""The build with and without a compiler, the declared dependencies, what must not be tracked."""

import ast
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import LONG

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest has tomli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIBRARIES = {"_C": "_build", "_cuda": "_cuda", "_emulator": "_emulator"}  # and their reports
IN_PLACE = ("build_ext", "--inplace")
BINDINGS = """#include <torch/headeronly/version.h>
#if defined(FASTLSTM_NO_CLUSTER)
#define ANSWER 43
#elif defined(FASTLSTM_EMULATE)
#define ANSWER 44
#else
#define ANSWER 42
#endif
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""
# Writes down how it is called, and leaves the work to the compiler that it was given.
NVCC = f"""#!{sys.executable}
import json, shlex, subprocess, sys
with open("nvcc.log", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
words = iter(sys.argv[1:])
compiler, flags = "c++", []
for word in words:
    if word == "-ccbin":
        compiler = next(words)
    elif word.startswith("-Xcompiler="):
        flags += word.partition("=")[2].split(",")
    elif not word.startswith(("-gencode=", "--threads=")):
        flags += ["-x", "c++", word] if word.endswith(".cu") else [word]
sys.exit(subprocess.run([compiler, *flags]).returncode)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The project with tiny sources, libraries of an older build, and a torch without CUDA."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fastlstm").mkdir()
    for source in (ROOT / "csrc").rglob("*.c*"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    for name in ("elf.py", "old_glibc.map", "toolchain.py"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "csrc")
    for source in ("csrc/bindings/register.cpp", "csrc/cuda/bindings.cpp"):
        (tmp_path / source).write_text(BINDINGS)
    (tmp_path / "fastlstm/__init__.py").touch()
    for library, report in LIBRARIES.items():
        (tmp_path / f"fastlstm/{library}.so").write_text("of an older build")
        (tmp_path / f"fastlstm/{report}_error.txt").write_text("of an older build")
    (tmp_path / "nvcc").write_text(NVCC)
    (tmp_path / "nvcc").chmod(0o755)
    (tmp_path / "torch").mkdir()
    for name in ("include", "lib"):
        (tmp_path / "torch" / name).symlink_to(Path(torch.__file__).parent / name)
    (tmp_path / "torch/__init__.py").touch()
    give_torch(tmp_path, cuda=None)
    return tmp_path


def give_torch(tree: Path, cuda: str | None) -> None:
    """Say which CUDA the torch in `tree` has, which is this one but for that."""
    (tree / "torch/version.py").write_text(f"debug = False\ncuda: Optional[str] = {cuda!r}\n")


def build(
    tree: Path, before: str = "pass", *, command: Sequence[str] = IN_PLACE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python setup.py COMMAND`, after the statements `before`; no CUDA, unless asked for."""
    code = f"import runpy, sys; {before}; sys.argv[1:] = {['-q', *command]}; "
    ours = re.compile("FASTLSTM_.*|TORCH_CUDA_ARCH_LIST|CUDACXX|CUDA_HOME")
    others = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    return subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"],
        cwd=tree,
        env=others | {"FASTLSTM_CUDA": "0"} | variables,
        capture_output=True,
        text=True,
        start_new_session=True,  # no terminal: the notice goes to stderr
    )


def answer(tree: Path, library: str) -> int:
    """Of a library that was built; then it has no report."""
    assert not (tree / f"fastlstm/{LIBRARIES[library]}_error.txt").exists()
    built = tree / f"fastlstm/{library}.so"
    copy = tree / f"{built.stat().st_mtime_ns}.so"  # a path that was loaded is not loaded again
    return ctypes.CDLL(shutil.copy(built, copy)).answer()


def missing(tree: Path, library: str) -> str:
    """The first line of why; then there is no library."""
    assert not (tree / f"fastlstm/{library}.so").exists()
    return (tree / f"fastlstm/{LIBRARIES[library]}_error.txt").read_text().partition("\n")[0]


@pytest.fixture
def compiler() -> None:
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        pytest.skip("no C++ compiler here")


@pytest.mark.usefixtures("compiler")
def test_build(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0, done.stderr
    assert answer(tree, "_C") == 42
    assert "FASTLSTM_CUDA=0" in missing(tree, "_cuda")
    assert "WITHOUT" not in done.stderr
    assert not (tree / "build/objects/_emulator").exists()


@pytest.mark.usefixtures("compiler")
def test_emulator(tree: Path) -> None:
    """Is built on its own, and leaves the other libraries as they are."""
    done = build(tree, command=["build_emulator"])
    assert done.returncode == 0, done.stderr
    assert answer(tree, "_emulator") == 44
    assert (tree / "fastlstm/_C.so").read_text() == "of an older build"


# Stands for what compiles Triton's kernels: it says into which folder.
AHEAD = """import sys
from pathlib import Path
action, folder = sys.argv[1:]
assert action == "build"
Path(folder).mkdir(parents=True)
Path(folder, "manifest.json").touch()
"""


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's kernels are for Linux")
def test_kernels_compiled_ahead(tree: Path) -> None:
    module = tree / "fastlstm/kernels/triton/ahead"
    module.mkdir(parents=True)
    (module / "__main__.py").write_text(AHEAD)
    (tree / "csrc/triton/register.cpp").write_text(BINDINGS)
    assert build(tree, command=["build_ext"]).returncode == 0
    (built,) = tree.glob("build/lib*/fastlstm")
    assert not (built / "_triton.so").exists()
    done = build(tree, command=["build_ext"], FASTLSTM_AHEAD="1")
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(str(built / "_triton.so")).answer() == 42
    assert (built / "kernels/triton/ahead/built/manifest.json").exists()
    (module / "__main__.py").write_text("raise SystemExit('no such GPU')")
    done = build(tree, command=["build_ext"], FASTLSTM_AHEAD="1")
    assert done.returncode != 0
    assert "no such GPU" in done.stderr
    give_torch(tree, "13.0")  # whose users may have Triton compile what they call
    done = build(tree, command=["build_ext"])
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(shutil.copy(built / "_triton.so", tree / "again.so")).answer() == 42


@pytest.mark.usefixtures("compiler")
def test_build_to_be_packed(tree: Path) -> None:
    done = build(tree, command=["build_ext"])
    assert done.returncode == 0, done.stderr
    (built,) = tree.glob("build/lib*/fastlstm")
    assert {path.name for path in built.iterdir()} == {
        "_C.so",
        "_cuda_error.txt",
        "_triton_error.txt",
    }


@pytest.mark.usefixtures("compiler")
def test_only_what_changed_is_compiled_again(tree: Path) -> None:
    def compiled() -> set[str]:
        """The sources of the objects that this build has made."""
        before = {path: path.stat().st_mtime_ns for path in tree.glob("build/**/*.o")}
        done = build(tree)
        assert done.returncode == 0, done.stderr
        after = {path: path.stat().st_mtime_ns for path in tree.glob("build/**/*.o")}
        made = (path for path, time in after.items() if before.get(path) != time)
        return {str(path.relative_to(tree / "build/objects")) for path in made}

    header, source = tree / "csrc/an answer.h", tree / "csrc/bindings/register.cpp"
    header.write_text(BINDINGS)
    source.write_text('#include "../an answer.h"\n')
    assert len(compiled()) > 20
    assert answer(tree, "_C") == 42
    os.utime(source)
    assert compiled() == set()
    header.write_text(BINDINGS.replace("42", "45"))
    assert compiled() == {"_C/csrc/bindings/register.o"}
    assert answer(tree, "_C") == 45

    setup = (tree / "setup.py").read_text()
    (tree / "setup.py").write_text(setup.replace('"-mavx2"', '"-mavx2", "-DNEW"'))
    kernels = ("isa/avx2", "quantized/avx2", "quantized/avxvnni")
    assert compiled() <= {f"_C/csrc/cpu/{name}.o" for name in kernels}
    source.write_text("int broken = no_such_name;")
    assert build(tree).returncode == 0
    assert build(tree).returncode == 0
    assert "no_such_name" in missing(tree, "_C")


def gpus(tree: Path) -> dict[str, list[str]]:
    """What nvcc was asked to compile for, by the name of the source or, last, of the library."""
    found = {}
    for line in (tree / "nvcc.log").read_text().splitlines():
        call = json.loads(line)
        name = next((word for word in call if word.endswith((".cu", ".cpp"))), call[-1])
        options = [word.partition("-gencode=") for word in call]
        found[Path(name).name] = [gpu for _, option, gpu in options if option]
    return found


SM80, SM86 = "arch=compute_80,code=sm_80", "arch=compute_86,code=[sm_86,compute_86]"
SM90, SM90_PTX = "arch=compute_90a,code=sm_90a", "arch=compute_90,code=[sm_90,compute_90]"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("wanted", "all_regimes", "clusters"),
    [
        (None, [SM80, SM90_PTX], [SM90_PTX]),
        ("8.0;9.0a", [SM80, SM90], [SM90]),
        ("8.0 8.6+PTX", [SM80, SM86], []),
    ],
)
def test_cuda(tree: Path, wanted: str | None, all_regimes: list[str], clusters: list[str]) -> None:
    """By whatever is given for nvcc, for the GPUs asked for; clusters only where GPUs have any."""
    given = {"TORCH_CUDA_ARCH_LIST": wanted} if wanted else {}
    done = build(tree, FASTLSTM_CUDA="1", CUDACXX=str(tree / "nvcc"), **given)
    assert done.returncode == 0, done.stderr
    assert answer(tree, "_cuda") == (42 if clusters else 43)
    expected = dict.fromkeys(("block.cu", "grid.cu", "_cuda.so"), all_regimes)
    expected |= {"bindings.cpp": [], "plan.cpp": []}
    expected |= dict.fromkeys(["cluster.cu", "wide.cu"] if clusters else [], clusters)
    assert gpus(tree) == expected


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("where", ["PATH", "CUDA_HOME"])
def test_cuda_is_built_wherever_there_is_nvcc(tree: Path, where: str) -> None:
    give_torch(tree, cuda="13.0")
    (tree / "bin").mkdir()
    (tree / "nvcc").rename(tree / "bin/nvcc")
    path = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in path if not shutil.which("nvcc", path=folder))
    if not shutil.which(os.environ.get("CXX", "c++").split()[0], path=path):
        pytest.skip("nvcc and the C++ compiler are in one folder here")
    places = {"PATH": f"{tree / 'bin'}{os.pathsep}{path}", "CUDA_HOME": str(tree)}
    done = build(tree, FASTLSTM_CUDA="", **{"PATH": path, where: places[where]})
    assert done.returncode == 0, done.stderr
    assert answer(tree, "_cuda") == 42


@pytest.mark.usefixtures("compiler")
def test_cuda_is_left_out_where_torch_has_none(tree: Path) -> None:
    """Nobody is kept waiting for a compiler whose kernels could not be called."""
    done = build(tree, FASTLSTM_CUDA="", CUDACXX=str(tree / "nvcc"))
    assert done.returncode == 0, done.stderr
    assert "torch was built without CUDA" in missing(tree, "_cuda")
    assert not (tree / "nvcc.log").exists()
    assert "WITHOUT" not in done.stderr

    assert build(tree, FASTLSTM_CUDA="1", CUDACXX=str(tree / "nvcc")).returncode == 0
    assert answer(tree, "_cuda") == 42


NO_CUDA = {
    "no nvcc": ("import shutil; shutil.which = lambda *_, **__: None", {}, "there is no nvcc", 0),
    "not nvcc": ("pass", {"CUDACXX": "no-such-nvcc"}, "'no-such-nvcc' cannot be run", 1),
    "fails": ("pass", {"CUDACXX": "false"}, "false failed", 1),
    "too old": ("pass", {"TORCH_CUDA_ARCH_LIST": "7.0 7.5"}, "has no GPU from 8.0 on", 1),
    "no GPU": ("pass", {"TORCH_CUDA_ARCH_LIST": "Ampere"}, "has 'Ampere' for a GPU", 1),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("before", "variables", "reason", "told"), NO_CUDA.values(), ids=NO_CUDA)
def test_cuda_that_cannot_be_built(
    tree: Path, before: str, variables: dict[str, str], reason: str, told: int
) -> None:
    """Is missing and says why; only where nvcc was there and failed does the install say so."""
    give_torch(tree, cuda="13.0")
    if "no nvcc" not in reason:
        variables = {"CUDACXX": str(tree / "nvcc")} | variables
    done = build(tree, before, **variables, FASTLSTM_CUDA="")
    assert done.returncode == 0
    assert reason in missing(tree, "_cuda")
    assert done.stderr.count("WITHOUT its CUDA kernels") == told
    assert answer(tree, "_C") == 42

    required = build(tree, before, **variables, FASTLSTM_CUDA="1")
    assert required.returncode == 1
    assert reason in required.stderr


@pytest.mark.usefixtures("compiler")
def test_emulator_that_cannot_be_built(tree: Path) -> None:
    """Is missed by the tests of this library alone."""
    (tree / "csrc/cuda/emulator/schedule.cpp").write_text("int broken = no_such_name;")
    done = build(tree, command=["build_emulator"])
    assert done.returncode == 0
    assert "no_such_name" in missing(tree, "_emulator")
    assert "WITHOUT" not in done.stderr
    again = build(tree, command=["build_emulator"], FASTLSTM_REQUIRE_EXTENSION="1")
    assert again.returncode == 1


OBSTACLES = {
    "no compiler": ("pass", "no-such-compiler", "'no-such-compiler' cannot be run"),
    "compiler fails": ("pass", "false", "false failed"),
    "no torch": ("sys.modules['torch'] = None", "c++", "install torch first"),
}


@pytest.mark.parametrize(("before", "compiler", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_build_that_cannot_work(tree: Path, before: str, compiler: str, reason: str) -> None:
    done = build(tree, before, CXX=compiler, CC=compiler)
    assert done.returncode == 0
    assert done.stderr.count("WITHOUT its C++ kernels") == 1
    assert reason in done.stderr
    assert reason in missing(tree, "_C")

    required = build(tree, before, CXX=compiler, CC=compiler, FASTLSTM_REQUIRE_EXTENSION="1")
    assert required.returncode == 1
    assert reason in required.stderr


@pytest.mark.usefixtures("compiler")
def test_build_of_broken_source(tree: Path) -> None:
    (tree / "csrc/cpu/isa/portable.cpp").write_text("int broken = no_such_name;")
    assert build(tree).returncode == 0
    first, *rest = (tree / "fastlstm/_build_error.txt").read_text().splitlines()
    assert "no_such_name" in first
    assert any("-std=c++17" in line and "portable.cpp" in line for line in rest)


def third_party(folder: str) -> set[str]:
    """The packages from elsewhere that the files of `folder` import, by the names pip knows."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import():
                    names |= {alias.name for alias in node.names}
                case ast.ImportFrom(level=0, module=str(module)):
                    names.add(module)
                case ast.Call(
                    func=ast.Name(id="extra"), args=[ast.Constant(value=str(module))]
                ) if folder == "benchmarks":
                    names.add(module.removeprefix("torch.utils."))
    files = [*(ROOT / "tests").iterdir(), *(ROOT / "csrc").glob("*.py")]
    own = {"fastlstm", "benchmarks", *(path.stem for path in files)}
    roots = {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names
    return {{"sklearn": "scikit-learn"}.get(name, name) for name in roots}


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def test_every_import_is_a_declared_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    core = distributions(PROJECT["dependencies"])
    bench = core | distributions(extras["bench"]) | distributions(extras["triton"])
    test = bench | distributions(extras["test"])
    assert {"fastlstm[bench]", "fastlstm[triton]"} <= set(extras["test"])
    assert third_party("fastlstm") <= core | distributions(extras["triton"])
    # FlashRNN and Haste are timed where their users have installed them.
    peers = distributions(extras["peers"]) | {"flashrnn", "haste_pytorch", "tensordict"}
    assert third_party("benchmarks") <= bench | peers | {"pytest"}
    assert third_party("tests") <= test


def test_import_brings_nothing_but_the_library() -> None:
    """Beside torch: neither Triton, nor Dynamo, nor anything else that takes a second to load."""
    code = """
import sys, torch
before = set(sys.modules)
import fastlstm
print(*sorted(m for m in set(sys.modules) - before if m.partition(".")[0] != "fastlstm"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_readme_has_one_line_that_ci_runs() -> None:
    """An installation and the tests, which .ci/run takes apart."""
    line = re.compile(r"pip install .* && python -m pytest( .*)?")
    lines = [
        found for found in (ROOT / "README.md").read_text().splitlines() if line.fullmatch(found)
    ]
    assert len(lines) == 1
    assert "[test]" in lines[0]


def test_the_workflow_runs_every_mark() -> None:
    """A job for each, beside the one that runs the README's command."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    parts = re.search(r"part: \[(.*)\]", workflow)[1]
    assert set(LONG) <= set(re.findall(r"\w+", parts))
    assert ".ci/run short" in workflow


def test_actions_are_named_by_commits() -> None:
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        for action in re.findall(r"uses: (.*)", workflow.read_text()):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v[\d.]+", action), action


def test_no_machine_path_is_tracked() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    machine_path = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/\w")
    for name in done.stdout.splitlines():
        text = (ROOT / name).read_text(errors="replace") if (ROOT / name).is_file() else ""
        found = machine_path.search(text)
        assert found is None, f"{name}: {text[found.start() :].splitlines()[0]}"
