"""The host's part of the CUDA kernels, as it is, on a stub of the CUDA runtime.

The stub (cudart_stub.cpp) keeps what launches ask for and refuses what a driver refuses. So the
way from a layer to its launches has run before a GPU sees it; the emulator does not take it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda_stub import ROOT, STUB, TESTS, compile_to, host_library

pytestmark = pytest.mark.slow
KINDS = ("bf16", "f16", "tf32", "exact")
BLOCK, CLUSTER, GRID = range(3)
NAMES = ("block", "cluster", "grid", "wide")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What cuda_host.py prints."""
    library = host_library(tmp_path_factory.mktemp("host"))
    variables = {
        "FASTLSTM_EMULATE": "1",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, TESTS / "cuda_host.py", library]
    run = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_launch_is_that_of_its_plan(found: dict[str, Any]) -> None:
    """Kernel, grid, block, shared memory, cluster, cooperation; all groups, and each once."""
    regimes = set()
    for layer in found["layers"]:
        assert layer["error"] is None, layer
        for backward, plan in enumerate(layer["result"]):
            launches = [one for one in layer["launches"] if one["backward"] == backward]
            groups = 2 * -(-layer["B"] // plan["batch"])
            first = range(0, groups, plan["groups"])
            assert [one["first_group"] for one in launches] == [*first]
            for one in launches:
                now = min(plan["groups"], groups - one["first_group"])
                regimes.add((plan["regime"], plan["blocks"], len(launches) > 1))
                assert one == {
                    "regime": NAMES.index(plan["regime"]),
                    "kind": KINDS.index(layer["kind"]),
                    "batch": plan["batch"],
                    "resident": plan["resident"],
                    "backward": backward,
                    "grid": now * plan["blocks"],
                    "block": 32 * plan["tiles"] * plan["parts"],
                    "shared": plan["shared_bytes"],
                    "cluster": plan["blocks"] if plan["regime"] in ("cluster", "wide") else 1,
                    "cooperative": plan["regime"] == "grid",
                    "stream": 0,
                    "device": 0,
                    "first_group": one["first_group"],
                    "T": 3,
                }
        for name, wish in layer["wishes"].items():
            assert {plan[name] for plan in layer["result"]} == {wish}
    assert {blocks for regime, blocks, _ in regimes if regime == "cluster"} == {2, 4, 8, 16}
    assert {regime for regime, _, several in regimes if several} == {"grid"}
    assert {blocks for regime, blocks, _ in regimes if regime == "wide"} == {8, 16}
    shared = [one["shared"] for layer in found["layers"] for one in layer["launches"]]
    assert max(shared) > 48 << 10  # which has to be asked for


def test_a_launch_goes_to_its_stream_and_device(found: dict[str, Any]) -> None:
    other, own = found["stream"]
    assert other["error"] is own["error"] is None
    assert [(one["stream"], one["device"]) for one in other["launches"]] == [(4321, 1)]
    assert [(one["stream"], one["device"]) for one in own["launches"]] == [(0, 0)]


def test_the_device_says_how_many_clusters_run_together(found: dict[str, Any]) -> None:
    """And which is the largest: a cluster does not leave its part of a GPU."""
    assert found["facts"] == {
        "a100": [80, 108, 163 << 10, 1, 0, 0, 0, 0],
        "h100": [90, 132, 227 << 10, 16, 66, 30, 12, 6],
        "half": [90, 64, 227 << 10, 8, 32, 16, 8, 0],
        "small": [90, 14, 60 << 10, 4, 6, 2, 0, 0],
    }


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("cluster too large", "starting a kernel failed: invalid cluster size"),
        ("no clusters", "setting the limits of a kernel failed: invalid argument"),
        ("shared memory", "starting a kernel failed: invalid argument"),
        ("not together", "starting a kernel failed: too many blocks in cooperative launch"),
        ("no such device", "cudaSetDevice failed: invalid device ordinal"),
        ("too many warps", "not a plan of this layer"),
        ("too little memory", "bytes of shared memory, got 16"),
    ],
)
def test_what_a_gpu_cannot_run_is_an_error(found: dict[str, Any], what: str, reason: str) -> None:
    assert reason in found[what]["error"]
    assert found[what]["launches"] == []


def test_the_stub_is_declared_as_the_toolkit_does(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).parents[1]]
    folders = [Path(home, "include") for home in homes if home]
    real = [folder for folder in folders if (folder / "cuda_runtime_api.h").exists()]
    if not real:
        pytest.skip("there is no CUDA toolkit")
    compile_to(tmp_path / "stub.o", STUB, real[0])
