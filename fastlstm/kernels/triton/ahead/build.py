"""Compiling all kernels into a folder: images for each GPU, and the manifest that describes them.

An image file has the kernels of one kind of GPU: code for it (``sm_90.cubin.xz``), or PTX that
GPUs of other kinds compile in their driver (``compute_80.ptx.xz``). Some that are alike are
compressed together: one is read without all others.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .compiling import Image, compiled, problem
from .keys import Key, described, general, keys
from .manifest import ARCHS, FORMAT, NAME, PTX_ARCHS, is_code, sources
from .plans import table

__all__ = ["BuildError", "build", "write"]

# Kernels that are compressed together, in 1.06 times the least: 15 ms to read one; 26 if it is
# PTX, which the driver compiles in far more.
_ALIKE, _ALIKE_PTX = 32, 64
_INSTRUCTION = 16  # bytes, of code for a GPU
_SMALLEST = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
_OF_CODE = _SMALLEST | {"lc": 0, "lp": 4, "pb": 4}  # a byte is like those 16 before and after it


class BuildError(RuntimeError):
    """Nothing can be compiled here; says why."""


def build(
    folder: Path,
    archs: Sequence[int] = ARCHS,
    ptx_archs: Sequence[int] = PTX_ARCHS,
    processes: int | None = None,
    only: Iterable[Key] | None = None,
) -> dict[str, Any]:
    """Compile kernels into a folder, and return the manifest.

    Args:
        folder: is made, or its files of an earlier build are replaced.
        archs: compute capabilities that get code, 10 * major + minor.
        ptx_archs: compute capabilities that get PTX.
        processes: that compile at the same time; one for each processor if it is None.
        only: the kernels; all if it is None.

    Raises:
        BuildError: this Triton cannot compile them.
    """
    reason = problem()
    if reason is not None:
        raise BuildError(f"the kernels cannot be compiled ahead: {reason}")
    every = sorted({*archs, *ptx_archs})
    given = None if only is None else list(only)
    jobs = [(key, arch) for arch in every for key in given or keys(table(arch))]
    wanted = list(dict.fromkeys(key for key, _ in jobs))
    workers = processes or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        images = dict(zip(jobs, _seen(pool.map(_compiled, jobs, chunksize=4), jobs), strict=True))
    if given is None:  # GPUs that nobody has tuned for need right results, not the fastest kernels
        kept = set(general(wanted))
        for job, image in images.items():
            if job[0] not in kept:
                images[job] = image._replace(ptx=b"")
    return write(folder, archs, ptx_archs, wanted, images)


def write(
    folder: Path,
    archs: Sequence[int],
    ptx_archs: Sequence[int],
    wanted: Sequence[Key],
    images: dict[tuple[Key, int], Image],
) -> dict[str, Any]:
    """Write compiled kernels to a folder, and return the manifest.

    Args:
        folder: is made, or its files of an earlier build are replaced.
        archs: compute capabilities that get code.
        ptx_archs: compute capabilities that get PTX.
        wanted: all kernels.
        images: of each kernel, for each GPU that has it; without PTX where that is left out.
    """
    every = sorted({*archs, *ptx_archs})
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.xz"), *folder.glob(NAME)):
        old.unlink()
    files: dict[str, Any] = {}
    for arch in archs:
        own = [images.get((key, arch)) for key in wanted]
        parts = [b"" if image is None else image.cubin for image in own]
        name = f"sm_{arch}.cubin.xz"
        files[name] = _write(folder / name, arch, wanted, parts, own)
    for arch in ptx_archs:
        name = f"compute_{arch}.ptx.xz"
        own = [images.get((key, arch)) for key in wanted]
        parts = [image.ptx + b"\0" if image and image.ptx else b"" for image in own]
        files[name] = _write(folder / name, arch, wanted, parts, own)
    manifest = {
        "format": FORMAT,
        "triton": version("triton"),
        "sources": sources(),
        "files": files,
        "plans": {str(arch): [list(row) for row in table(arch)] for arch in every},
        "kernels": [
            _kernel(key, [images[key, arch] for arch in every if (key, arch) in images])
            for key in wanted
        ],
    }
    (folder / NAME).write_text(json.dumps(manifest, separators=(",", ":")) + "\n")
    return manifest


def _compiled(job: tuple[Key, int]) -> Image:
    return compiled(*job)


def _seen(images: Iterator[Image], jobs: Sequence[Any]) -> Iterator[Image]:
    """Pass images on, and tell the terminal how many there are."""
    for number, image in enumerate(images, 1):
        if sys.stderr.isatty():
            print(f"\r{number} of {len(jobs)} kernels", end="", file=sys.stderr, flush=True)
        yield image


def _kernel(key: Key, images: Sequence[Image]) -> dict[str, Any]:
    """Describe a kernel: what is alike on all GPUs that have it."""
    first = images[0]
    assert all(each[:2] == first[:2] for each in images)
    return described(key, first.entry, first.arguments)


def _write(
    file: Path,
    arch: int,
    wanted: Sequence[Key],
    parts: Sequence[bytes],
    images: Sequence[Image | None],
) -> dict[str, Any]:
    """Write the images of a GPU; return what the manifest says of the file."""
    count, how = (_ALIKE, _OF_CODE) if is_code(file.name) else (_ALIKE_PTX, _SMALLEST)
    there = [place for place, part in enumerate(parts) if part]
    # Those of bfloat16 and of float16 have little but the names of instructions apart.
    there.sort(key=lambda place: (wanted[place]._replace(kind=""), wanted[place].kind))
    groups: list[list[int]] = []
    places = [[0, 0, 0, 0]] * len(parts)
    packed = b""
    for first in range(0, len(there), count):
        together = b""
        for place in there[first : first + count]:
            image, part = images[place], parts[place]
            assert image is not None
            places[place] = [len(groups), len(together), len(part), image.shared]
            together += part + b"\0" * (-len(part) % _INSTRUCTION)
        compressed = lzma.compress(together, filters=[how])
        groups.append([len(packed), len(compressed)])
        packed += compressed
    file.write_bytes(packed)
    return {
        "arch": arch,
        "bytes": len(packed),
        "sha256": sha256(packed).hexdigest(),
        # Of what is compressed together: where it begins in the file, and its bytes there.
        "groups": groups,
        # Of each kernel: its group, where it begins in that, its bytes, bytes of shared memory; no
        # bytes where these GPUs do not have it.
        "places": places,
    }
