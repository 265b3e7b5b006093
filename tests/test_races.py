"""What the CUDA kernels exchange is written before it is read, in any order of threads.

races.cpp runs the kernels' own code in the emulator under the thread sanitizer, to which every
thread of a GPU is a thread. It is built once as it is, and once for each way of breaking the
protocol: a checker that does not see those would prove nothing.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-Wno-unknown-pragmas", "-DFASTLSTM_EMULATE", "-DFASTLSTM_TSAN"]
RACE = 66  # exit status of the sanitizer


def sanitizer_is_missing(folder: Path) -> str | None:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*COMPILER, "-fsanitize=thread", str(source), "-o", str(folder / "empty")]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        done = subprocess.run([folder / "empty"], capture_output=True, text=True)
    return done.stderr.strip() or "it fails" if done.returncode else None


def build(sources: Path, folder: Path) -> Path:
    """races.cpp with the headers of `sources`; the emulator itself is not what is checked."""
    program = folder / "races"
    flags = {ROOT / "tests/races.cpp": ["-O1", "-g", "-fsanitize=thread"]}
    flags |= {path: ["-O2"] for path in sorted((sources / "emulator").glob("*.cpp"))}
    objects = []
    for source, own in flags.items():
        objects.append(folder / f"{source.stem}.o")
        command = [*COMPILER, *FLAGS, *own, f"-I{sources}", "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    subprocess.run([*COMPILER, "-fsanitize=thread", *objects, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("races")
    reason = sanitizer_is_missing(found)
    if reason and os.environ.get("FASTLSTM_REQUIRE_EXTENSION") == "1":
        pytest.fail(f"FASTLSTM_REQUIRE_EXTENSION=1, but there is no thread sanitizer: {reason}")
    if reason:
        pytest.skip(f"no thread sanitizer: {reason}")
    return found


@pytest.fixture(scope="module")
def races(folder: Path) -> Path:
    return build(ROOT / "csrc/cuda", folder)


def run(program: Path, regime: str, blocks: int, parts: int, H: int) -> tuple[int, str]:
    command = [program, regime, str(blocks), str(parts), str(H)]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "blocks", "parts", "H"),
    [
        ("block", 1, 1, 40),
        ("cluster", 2, 2, 40),
        ("cluster", 4, 1, 50),
        ("cluster", 4, 2, 40),  # one block has nothing to do
        ("cluster", 8, 1, 128),
        ("cluster", 16, 1, 256),
        ("grid", 3, 2, 40),
        ("grid", 5, 1, 70),
        ("wide", 8, 4, 128),
        ("wide, dense rows", 8, 4, 128),
    ],
)
def test_no_race(races: Path, regime: str, blocks: int, parts: int, H: int) -> None:
    status, text = run(races, regime, blocks, parts, H)
    assert status == 0 and text == "the same numbers in every order\n", text


IN_WIDE = "wide", 8, 4, 100  # regime, blocks, parts, H
# What is broken: a file, a text in it and what takes its place, and where that shows.
BROKEN = {
    "a block without its barrier": (
        "exchange.h", "void wait(int) { sync_block(); }", "void wait(int) {}", ("block", 1, 1, 40),
    ),
    "one buffer instead of two": (
        "exchange.h", "s % 2", "0 * s", ("block", 1, 1, 40),
    ),
    "a phase of a cluster too early": (
        "exchange.h", "s / 2 % 2", "(s / 2 + 1) % 2", ("cluster", 2, 1, 40),
    ),
    "half of the bytes": (
        "exchange.h", "4 * words", "2 * words", ("cluster", 2, 1, 40),
    ),
    "a step of a grid too early": (
        "exchange.h", "blocks * (s + 1)", "blocks * s", ("grid", 3, 2, 40),
    ),
    "published before the block has stored": (
        "exchange.h", "{\n    sync_block();\n    if", "{\n    if", ("grid", 3, 2, 40),
    ),
    "sums before they are there": (
        "forward.h", "      sync_block();", "", ("cluster", 2, 2, 40),
    ),
    "wide, one buffer instead of two": (
        "wide_forward.h", "s % 2 * kBufferPieces", "0", IN_WIDE,
    ),
    "wide, sums before they are there": (
        "wide_forward.h", "sync_block();\n    sums.get", "sums.get", IN_WIDE,
    ),
    "wide, sent before it is there": (
        "wide_forward.h", "E::narrow(h);\n    sync_block();", "E::narrow(h);", IN_WIDE,
    ),
    "wide, gradients of one buffer": (
        "wide_backward.h", "own + s % 2 * kTerms", "own", IN_WIDE,
    ),
    "inputs that have not arrived": (
        "forward.h", "wait_copies<kStages - 1>()", "wait_copies<kStages>()", ("block", 1, 1, 40),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_seen(folder: Path, tmp_path: Path, what: str) -> None:
    name, text, instead, arguments = BROKEN[what]
    sources = tmp_path / "cuda"
    shutil.copytree(ROOT / "csrc/cuda", sources)
    file = sources / name
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, instead))
    status, output = run(build(sources, tmp_path), *arguments)
    seen = "ThreadSanitizer: data race" in output or "WRONG NUMBERS" in output
    assert status != 0 and (seen or "fastlstm, emulated kernel" in output or "deadlock" in output)
