"""The wheel and the sdist: what the library asks of a machine, tags, what is packed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastlstm
from fastlstm import extension

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import elf  # noqa: E402

# The C interface that torch promises to keep: one build for every torch from 2.10 on.
STABLE = ("csrc/inductor/aoti_torch/c/shim.h", "csrc/stable/c/shim.h")
OF_LINKER = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


@pytest.fixture
def library() -> elf.Library:
    file = extension._find("_C")
    if file is None:
        pytest.skip("the library has not been built")
    return elf.Library(file)


def test_only_stable_symbols_of_torch_are_used(library: elf.Library) -> None:
    """No other function of torch, none of Python; the rest has versions, of libc and libstdc++."""
    headers = Path(torch.__file__).parent / "include/torch"
    promised = set(re.findall(r"\w+", "".join((headers / name).read_text() for name in STABLE)))
    others = {symbol.name for symbol in library.symbols if not symbol.version} - OF_LINKER
    own = {name for name in others if not name.startswith(("_ZNSt", "_ZNKSt", "_ZSt"))}
    assert any(name.startswith("aoti_torch_") for name in own)
    assert own <= promised
    assert not any(name.startswith(("Py", "_Py")) for name in own)


def test_it_runs_on_every_linux_of_torch(library: elf.Library) -> None:
    """csrc/old_glibc.cpp has what a newer libc or libstdc++ would be asked for."""
    versions = {(family, library.newest(family)) for family in ("GLIBC", "GLIBCXX", "CXXABI")}
    assert elf.platform_tag([library]) == f"manylinux_2_28_{library.machine}", versions


def test_the_tag_follows_from_the_symbols(library: elf.Library) -> None:
    for symbol, tag in [
        (elf.Symbol("of 2021", "GLIBC_2.33"), "manylinux_2_34"),
        (elf.Symbol("of GCC 12", "GLIBCXX_3.4.30"), "manylinux_2_35"),
        (elf.Symbol("of tomorrow", "GLIBC_2.99"), "linux"),
    ]:
        library.symbols.append(symbol)
        assert elf.platform_tag([library]) == f"{tag}_{library.machine}"


def test_errors_pass_through_torch(library: elf.Library) -> None:
    """They are thrown by the libstdc++ that catches them, and not by one of the library's own."""
    assert any(symbol == ("__cxa_throw", "CXXABI_1.3") for symbol in library.symbols)


def test_what_is_no_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    assert not elf.is_elf(tmp_path / "text")
    assert not elf.is_elf(tmp_path / "missing")
    with pytest.raises(
        ValueError, match="not an ELF file of one of these machines: x86_64, aarch"
    ):
        elf.Library(tmp_path / "text")


def test_version_has_one_source() -> None:
    assert f'version = "{fastlstm.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"__version__ = [\"']", (ROOT / "fastlstm/__init__.py").read_text())


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A copy of the project, and in its dist/ a wheel without kernels and an sdist."""
    tree = tmp_path / "project"
    ignored = shutil.ignore_patterns("build", "*.egg-info", ".*", "*.so", "*_error.txt", "results")
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = "import sys; sys.modules['torch'] = None; import runpy; sys.argv[1:] = {}; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    variables = {k: v for k, v in os.environ.items() if k != "FASTLSTM_REQUIRE_EXTENSION"}
    for command in (["-q", "bdist_wheel"], ["-q", "sdist"]):
        run = [sys.executable, "-c", code.format(command)]
        options = {"cwd": tree, "env": variables, "start_new_session": True}
        subprocess.run(run, check=True, capture_output=True, **options)
    return tree


def test_the_wheel_is_of_no_python(packed: Path) -> None:
    (wheel,) = (packed / "dist").glob("*.whl")
    assert re.fullmatch(r"fastlstm-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {"fastlstm/py.typed", "fastlstm/_build_error.txt"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)


def test_the_sdist_has_what_builds_and_tests_it(packed: Path) -> None:
    (archive,) = (packed / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("csrc", "fastlstm", "tests", "benchmarks"):
        here = (path for path in (packed / folder).rglob("*") if path.is_file())
        ours = {str(path.relative_to(packed)) for path in here if "__pycache__" not in path.parts}
        assert {name for name in ours if not name.endswith("_error.txt")} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not any(name.endswith((".so", ".o", "_error.txt")) for name in names)
