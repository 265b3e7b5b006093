"""Kernels compiled ahead by the command of the build: the same bytes again, and whole files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from cubin import parameters

from benchmarks.gpu.kernels import fresh_compiler
from fastlstm.kernels.triton.ahead.manifest import Manifest

pytestmark = pytest.mark.compiles
# Two of all: with products that are made before, and of sizes that divide by nothing.
CODE = """
import sys
from pathlib import Path
from fastlstm.kernels.triton.ahead.build import build
from fastlstm.kernels.triton.ahead.keys import keys
from fastlstm.kernels.triton.ahead.plans import table
if __name__ == "__main__":
    found = keys(table(80))
    wanted = [next(key for key in found if key.back), found[0]]
    build(Path(sys.argv[1]), [90, 100], [80], 1, wanted)
"""


# Asked of a compiler: Triton is interpreted in the process of the tests.
PROBLEM = """
from fastlstm.kernels.triton.ahead.compiling import problem
print(problem() or "", end="")
"""


@pytest.fixture(autouse=True)
def possible() -> None:
    with fresh_compiler():
        command = [sys.executable, "-c", PROBLEM]
        problem = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if problem:
        pytest.skip(f"kernels are not compiled ahead here: {problem}")


def built(folder: Path) -> Path:
    """A build from nothing."""
    script = folder.with_suffix(".py")
    script.write_text(CODE)
    with fresh_compiler():
        subprocess.run([sys.executable, script, folder], check=True)
    return folder


def test_build(tmp_path: Path) -> None:
    folder, again = built(tmp_path / "one"), built(tmp_path / "two")
    names = {file.name for file in folder.iterdir()}
    assert names == {"manifest.json", "sm_90.cubin.xz", "sm_100.cubin.xz", "compute_80.ptx.xz"}
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    found = Manifest.read(folder)
    for name in found.files:
        for place, kernel in enumerate(found.kernels):
            image, _ = found.image(name, place)
            if ".ptx" in name:
                assert b".target sm_80" in image
                assert image.endswith(b"\0")
                continue
            said = [int(word.split(":")[1]) for word in kernel["arguments"].split()]
            assert parameters(image, kernel["entry"]) == [*said, 8, 8]  # two are Triton's own
    command = [sys.executable, "-m", "fastlstm.kernels.triton.ahead", "check", folder]
    checked = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "2 kernels" in checked
    assert "all files are whole" in checked
    file = folder / "sm_90.cubin.xz"
    file.write_bytes(bytes(file.stat().st_size))
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 1
    assert "sm_90.cubin.xz is not what the manifest says" in checked.stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sources"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checked = subprocess.run(command, capture_output=True, text=True)
    assert "of another version of fastlstm" in checked.stderr
