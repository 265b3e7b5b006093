"""Kernels compiled ahead: which there are, their manifest, and what is said of one that is bad.

tests/test_executed_ahead.py executes them.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # compiles them

import fastlstm
from fastlstm.kernels.triton import config
from fastlstm.kernels.triton.ahead.build import write
from fastlstm.kernels.triton.ahead.compiling import Image
from fastlstm.kernels.triton.ahead.keys import Key, keys
from fastlstm.kernels.triton.ahead.manifest import ARCHS, NAME, Manifest, ManifestError
from fastlstm.kernels.triton.ahead.plans import KINDS, REGIMES, Row, element_and_precision, table
from fastlstm.spec import LayerSpec

MOST_WAVES, QUARTERS = 6, 4  # of csrc/triton/kernels.cpp
ARGUMENTS = [("x", 8), ("T", 4)]
KERNELS = 35  # of a folder in these tests: more than are compressed together


def first(
    rows: list[Row], back: bool, kind: str, problem: config.Problem, device: config.Device
) -> Row | None:
    """What C++ finds."""
    spec = problem.spec
    for row in rows:
        fits = row.most_units >= spec.hidden_size and row.most_inputs >= spec.input_size
        if row.blocks > 1 or row.batch < (4 if kind == "exact" else 8):
            room = device.processors * max(1, QUARTERS // row.warps)
            if row.blocks > 1:
                room = MOST_WAVES * device.at_once(row.blocks)
            fits &= -(-problem.B // row.batch) * spec.directions <= room
        if fits and row.back == back and KINDS[row.kind] == kind:
            return row
    return None


@pytest.mark.parametrize("arch", [*ARCHS, 86, 89])
def test_table_says_what_config_says(arch: int) -> None:
    rows, chance = table(arch), random.Random(0)
    for _ in range(2000):
        kind, back = chance.choice(KINDS), chance.random() < 0.5
        I, H, B = (
            chance.randint(1, 200),
            chance.randint(1, 550),
            chance.choice((1, 7, 64, 300, 1500, 5000)),
        )
        spec = LayerSpec("LSTM", I, H, directions=chance.choice((1, 2)))
        problem = config.Problem(spec, B, *element_and_precision(kind))
        device = config.Device(
            arch, 100, together=chance.choice(((), (0, 0, 32, 16, 7), (0,) * 5))
        )
        plan = (config.backward_plan if back else config.forward_plan)(problem, device)
        row = first(rows, back, kind, problem, device)
        if row is None:
            assert plan.regime not in REGIMES
            continue
        assert (REGIMES[row.regime], *row[5:7], *row[8:]) == (
            *(plan.regime, plan.units, plan.batch),
            *(plan.warps, plan.blocks),
        )
        assert row.inputs == (config.padded(I) if plan.fused else 0)


def test_every_kernel_has_a_number_and_a_name() -> None:
    found = keys(table(90))
    assert len({key.number for key in found}) == len({key.name for key in found}) == len(found)
    assert all(key.number < 2**31 for key in found)


def folder_of(folder: Path, wanted: list[Key]) -> Path:
    """Kernels that are nothing but text."""
    images = {
        (key, arch): Image("entry", ARGUMENTS, 1024, f"{key} {arch}".encode(), b"// PTX")
        for key in wanted
        for arch in ARCHS
    }
    write(folder, ARCHS, ARCHS[:1], wanted, images)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "kernels", keys(table(90))[:KERNELS])


def test_manifest_is_read_again(folder: Path) -> None:
    found = Manifest.read(folder)
    assert [kernel["arguments"] for kernel in found.kernels] == ["x:8 T:4"] * KERNELS
    assert found.damaged() is None
    wanted = keys(table(90))[:KERNELS]
    for name, about in found.files.items():
        assert (len(about["groups"]) > 1) is (".cubin" in name)
        for place, key in enumerate(wanted):
            text = f"{key} {about['arch']}".encode() if ".cubin" in name else b"// PTX\0"
            assert found.image(name, place) == (text, 1024)
            assert found.places[key.number] == place
    again = folder_of(folder.parent / "again", wanted)
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())


@pytest.mark.parametrize(
    ("gpu", "file"),
    [
        (75, None),
        (80, "sm_80.cubin.xz"),
        (86, "sm_80.cubin.xz"),
        (89, "sm_80.cubin.xz"),
        (90, "sm_90.cubin.xz"),
        (100, "sm_100.cubin.xz"),
        (103, "compute_80.ptx.xz"),
        (120, "compute_80.ptx.xz"),
    ],
)
def test_kernels_of_a_gpu(folder: Path, gpu: int, file: str | None) -> None:
    assert Manifest.read(folder).file_for(gpu) == file


def edited(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A change of what the manifest says."""

    def edit(folder: Path) -> None:
        found = json.loads((folder / NAME).read_text())
        change(found)
        (folder / NAME).write_text(json.dumps(found))

    return edit


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / NAME).unlink(), "not compiled when fastlstm was built"),
    "truncated": (lambda f: (f / NAME).write_text((f / NAME).read_text()[:99]), "damaged"),
    "not a manifest": (lambda f: (f / NAME).write_text("[1, 2]"), "not a list of kernels"),
    "newer": (edited(lambda m: m.update(format=1)), "not a list of kernels"),
    "foreign": (edited(lambda m: m.update(sources="0")), "another version of fastlstm"),
    "no plans": (edited(lambda m: m.pop("plans")), "has no plans"),
    "no arguments": (edited(lambda m: m["kernels"][1].pop("arguments")), "kernel 1 .* arguments"),
    "text": (edited(lambda m: m["kernels"][2].update(warps="4")), "kernel 2 .* no int"),
    "few places": (
        edited(lambda m: m["files"]["sm_80.cubin.xz"]["places"].pop()),
        "sm_80.cubin.xz does not have 35 kernels",
    ),
    "short file": (lambda f: (f / "sm_90.cubin.xz").write_bytes(b"1"), "has 1 bytes instead of"),
    "no file": (lambda f: (f / "sm_90.cubin.xz").unlink(), "has 0 bytes instead of"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
def test_bad_manifest_is_refused(folder: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(folder)
    with pytest.raises(ManifestError, match=said):
        Manifest.read(folder)


def test_other_bytes_of_the_same_length_are_found(folder: Path) -> None:
    file = folder / "sm_90.cubin.xz"
    file.write_bytes(bytes(file.stat().st_size))
    assert "sm_90.cubin.xz" in str(Manifest.read(folder).damaged())


@pytest.mark.parametrize("name", ["compute_80.ptx.xz", "sm_90.cubin.xz"])
def test_damaged_kernels_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    found = Manifest.read(folder)
    with pytest.raises(ManifestError, match=f"{name} is damaged"):
        found.image(name, 0)


def test_a_kernel_that_is_cut_off_is_refused(folder: Path) -> None:
    edited(lambda m: m["files"]["sm_90.cubin.xz"]["places"][-1].__setitem__(2, 10**6))(folder)
    found = Manifest.read(folder)
    with pytest.raises(
        ManifestError, match=r"sm_90\.cubin\.xz is damaged: kernel 34 is not whole"
    ):
        found.image("sm_90.cubin.xz", KERNELS - 1)


def test_mode_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlstm.kernels import triton

    monkeypatch.setenv("FASTLSTM_TRITON", "ahed")
    with pytest.raises(ValueError, match="FASTLSTM_TRITON is 'ahed', expected one of auto"):
        triton._load.__wrapped__()


def test_without_a_gpu_nothing_changes() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with fastlstm.backend("triton"):
        assert "interpreted" in fastlstm.explain(fastlstm.LSTM(3, 4), torch.zeros(2, 1, 3)).kernel
