"""`python -m benchmarks report`: what it makes of results; that the committed ones are fresh."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.report import charts, gpu, tables
from benchmarks.report.command import READMES
from benchmarks.speed.results import FOLDER, Results, load

README = """# Title
<!-- report: speed cpu-x-speed.json -->
old
<!-- end of report -->
between
<!-- report: losses cpu-x-speed.json -->
<!-- end of report -->
"""


def row(provider: str, ratio: float, **other: Any) -> dict[str, Any]:
    return {
        "group": "tasks",
        "case": "binary",
        "shape": "10,32,2,1,512,20",
        "mode": "infer",
        "precision": "exact",
        "graph": False,
        "threads": 2,
        "provider": provider,
        "version": "1.0",
        "p20_us": 90.0 * ratio,
        "p50_us": 100.0 * ratio,
        "p80_us": 110.0 * ratio,
        "us_per_step": 5.0 * ratio,
        "times_floor": 2.0,
        "ratio": ratio,
        "max_error": 1e-7,
        "peak_bytes": 2**21,
        "first_call_s": 0.5,
        **other,
    }


ROWS = [
    row("fastlstm", 1.0),
    row("torch", 1.5),
    row("onnxruntime", 0.806),
    {**row("jax", 1.0), "skipped": "no time"},
    row("fastlstm", 1.0, mode="train"),
    row("torch", 2.0, mode="train", peak_bytes=2**22),
    *(
        row(name, ratio, group="map", case=f"H={H} B={B} T=32", shape=f"{H},{H},1,1,{B},32")
        for H, B in ((16, 1), (16, 4), (32, 4))
        for name, ratio in (("fastlstm", 1.0), ("torch", 0.4 * H / 16))
    ),
    *(
        row(name, ratio, group="sweep-T", case=f"T={T}", mode=mode, shape=f"64,64,1,1,16,{T}")
        for T, mode in ((1, "step"), (4, "infer"), (4, "train"))
        for name, ratio in (("fastlstm", 1.0), ("torch", 3.0))
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results, and a README that asks for them."""
    facts = {"cpu": "A CPU", "isa": "avx2", "threads": 2, "torch": "2.13", "commit": "abcdef0123"}
    results = Results(tmp_path / "cpu-x-speed.json", {**facts, "date": "2026-01-02T03:04:05"})
    results.add(ROWS)
    (tmp_path / "TOP.md").write_text(README)
    return tmp_path


def report(folder: Path, *options: str) -> int:
    return command.main(
        ["report", "--results", str(folder), "--readme", str(folder / "TOP.md"), *options]
    )


def test_committed_reports_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", "--check"]) == 0, capsys.readouterr().out


def test_a_committed_report_that_is_stale_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each of the files that are filled or written."""
    commit = load(FOLDER / "cpu-zen5-speed.json").environment["commit"][:7]
    results = tmp_path / "results"
    shutil.copytree(FOLDER, results)
    copies = [tmp_path / f"{number}.md" for number in range(len(READMES))]
    for readme, copy in zip(READMES, copies, strict=True):
        shutil.copy(readme, copy)
    options = ["report", "--results", str(results), "--readme", *map(str, copies), "--check"]
    assert command.main(options) == 0
    for file in (*copies, results / "README.md"):
        fresh = file.read_text()
        assert commit in fresh
        file.write_text(fresh.replace(commit, "0123456"))
        assert command.main(options) == 1
        assert f"stale: {file}\n" in capsys.readouterr().out
        file.write_text(fresh)


@pytest.mark.parametrize("readme", READMES, ids=lambda file: file.parent.name)
def test_every_table_of_a_readme_has_its_file(readme: Path) -> None:
    """A number that is typed in has no place there."""
    named = [
        line.split()[3]
        for line in readme.read_text().splitlines()
        if line.startswith("<!-- report:")
    ]
    assert named and all((FOLDER / name).exists() for name in named)


def test_writes_and_checks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(folder, "--check") == 1
    assert (folder / "TOP.md").read_text() == README  # a check writes nothing
    assert report(folder) == 0
    assert report(folder, "--check") == 0
    text = (folder / "TOP.md").read_text()
    assert text.startswith("# Title\n") and "\nbetween\n" in text and "old" not in text
    assert "| 100 | 1.50x | **0.81x** ONNX Runtime | 100 | 2.00x |  |" in text
    assert "| inference | ONNX Runtime" not in text
    assert (
        "| binary | 10, 32, 2, 1, 512, 20 | infer | ONNX Runtime | 80.6 | 100 | **0.81x** |"
        in text
    )
    assert {file.name for file in folder.glob("*.svg")} == {
        "cpu-x-map.svg",
        "cpu-x-memory.svg",
        "cpu-x-scaling.svg",
    }
    overview = (folder / "README.md").read_text()
    assert "![map](cpu-x-map.svg)" in overview and "A CPU (avx2), 2 threads" in overview
    capsys.readouterr()
    results = load(folder / "cpu-x-speed.json")
    results.rows[0]["p50_us"] = 77.0
    results.add([])
    assert report(folder, "--check") == 1
    stale = capsys.readouterr().out
    assert "TOP.md" in stale and "README.md" in stale and ".svg" not in stale
    results.rows[6]["ratio"] = results.rows[7]["ratio"] = 1.25
    results.add([])
    report(folder, "--check")
    assert "cpu-x-map.svg" in (out := capsys.readouterr().out) and "memory" not in out


def test_a_faster_peer_is_shown_as_faster() -> None:
    results = Results(None, {"threads": 2})
    results.rows = ROWS
    found = tables.losses(results)
    assert "ONNX Runtime" in found and "**0.40x**" in found and "1.50x" not in found
    assert "0.81x of the fastest peer" in tables.means(results)
    results.rows = [row("fastlstm", 1.0), row("torch", 1.0)]
    assert tables.losses(results).startswith("No peer is faster")


def test_the_small_table_has_six_rows_and_a_loss() -> None:
    results = load(FOLDER / "cpu-avx2-speed.json")
    made = tables.summary(results)
    assert len(made.splitlines()) == 2 + 6
    assert "| MNIST by rows, 28→64, B=128, T=28 | " in made
    assert "512→512→512, B=32" in made and "64→64, B=1, T=1 |" in made
    if "**" in tables.losses(results):
        assert "**" in made, "a case in which a peer is faster"


def test_the_small_table_leaves_out_what_was_not_measured(folder: Path) -> None:
    """Its cases are named; a file of results without them has empty cells."""
    made = tables.summary(load(folder / "cpu-x-speed.json"))
    assert made.count("|  |  |  |  |  |  |") == 6


def test_a_gpu_has_a_line_for_both_ways_to_call(folder: Path) -> None:
    results = Results(None, {})
    for graph in (False, True):
        for name, ratio in (("fastlstm", 1.0), ("torch", 0.5 if graph else 3.0)):
            more = {"precision": "tf32", "graph": graph}
            results.add([row(name, ratio, **more)])
    (line,) = gpu.table(results).splitlines()[2:]
    call = "| binary | 10, 32, 2, 1, 512, 20 | float32, TF32 | inference"
    assert line == f"{call} | 100 | 3.00x | 100 | **0.50x** |"


def test_pictures_are_the_same_every_time(folder: Path) -> None:
    results = load(folder / "cpu-x-speed.json")
    for name, (rows, draw) in charts.charts(results).items():
        first, second = folder / f"{name}-1.svg", folder / f"{name}-2.svg"
        charts.save(first, rows, draw, results)
        charts.save(second, rows, draw, results)
        assert first.read_bytes() == second.read_bytes()
        assert charts.drawn_from(first) == charts.digest(rows)


def test_unknown_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "TOP.md").write_text(
        "<!-- report: magic cpu-x-speed.json -->\n<!-- end of report -->"
    )
    assert report(folder) == 1
    assert "there are: caption, summary, speed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", README.replace("<!-- end of report -->", "", 1)])
def test_lost_markers_are_no_success(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "TOP.md").write_text(text)
    assert report(folder, "--check") == 1
    assert "markers of a report, and an end for" in capsys.readouterr().err


def test_missing_readme_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "TOP.md").unlink()
    assert report(folder) == 1
    assert "TOP.md cannot be read" in capsys.readouterr().err


def test_missing_results_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(folder / "cpu-x-speed.json", folder / "elsewhere.json")
    assert report(folder) == 1
    assert "cpu-x-speed.json cannot be read" in capsys.readouterr().err
