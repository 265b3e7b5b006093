"""The build with and without a compiler, the declared dependencies, what must not be tracked."""

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest has tomli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNITS = ("dispatch", "portable", "avx2", "avx512")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project with tiny sources, and the library of an older build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc/cpu", "fastlstm"):
        (tmp_path / name).mkdir(parents=True)
    for unit in UNITS:
        (tmp_path / "csrc/cpu" / f"{unit}.cpp").touch()
    (tmp_path / "csrc/bindings.cpp").write_text(
        "#include <torch/headeronly/version.h>\n"
        'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
    )
    (tmp_path / "fastlstm/__init__.py").touch()
    (tmp_path / "fastlstm/_C.so").write_text("of an older build")
    return tmp_path


def build(tree: Path, before: str = "pass", **variables: str) -> subprocess.CompletedProcess[str]:
    """`python setup.py build_ext --inplace`, after the statements `before`."""
    code = f"import runpy, sys; {before}; sys.argv[1:] = ['-q', 'build_ext', '--inplace']; "
    return subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"],
        cwd=tree,
        env={k: v for k, v in os.environ.items() if k != "FASTLSTM_REQUIRE_EXTENSION"} | variables,
        capture_output=True,
        text=True,
        start_new_session=True,  # no terminal: the notice goes to stderr
    )


def test_build(tree: Path) -> None:
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        pytest.skip("no C++ compiler here")
    (tree / "fastlstm/_build_error.txt").write_text("of an older build")
    done = build(tree)
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(str(tree / "fastlstm/_C.so")).answer() == 42
    assert not (tree / "fastlstm/_build_error.txt").exists()


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
    assert reason in (tree / "fastlstm/_build_error.txt").read_text()
    assert not (tree / "fastlstm/_C.so").exists()

    required = build(tree, before, CXX=compiler, CC=compiler, FASTLSTM_REQUIRE_EXTENSION="1")
    assert required.returncode == 1
    assert reason in required.stderr


def test_build_of_broken_source(tree: Path) -> None:
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        pytest.skip("no C++ compiler here")
    (tree / "csrc/cpu/portable.cpp").write_text("int broken = no_such_name;")
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
    own = {"fastlstm", "benchmarks", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    roots = {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names
    return {{"sklearn": "scikit-learn"}.get(name, name) for name in roots}


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def test_every_import_is_a_declared_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    core = distributions(PROJECT["dependencies"])
    bench = core | distributions(extras["bench"])
    test = bench | distributions(extras["test"])
    assert "fastlstm[bench]" in extras["test"]
    assert third_party("fastlstm") <= core
    assert third_party("benchmarks") <= bench
    assert third_party("tests") <= test


def test_readme_has_one_line_that_ci_runs() -> None:
    lines = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.endswith("python -m pytest")
    ]
    assert len(lines) == 1
    assert lines[0].startswith("pip install")


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
