"""Compiling all kernels into a folder: images for each GPU, and the manifest that describes them.

An image file has the kernels of one kind of GPU one after the other, in the order of the manifest.
Code for a GPU (``sm_90.cubin``) is left as it is, for a program that maps the file into memory;
PTX (``compute_80.ptx.xz``), which GPUs of other kinds compile in their driver, is compressed.
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
from .keys import Key, keys
from .manifest import ARCHS, FORMAT, NAME, PTX_ARCHS, sources
from .plans import table

__all__ = ["BuildError", "build", "write"]

_ALIGNMENT = 16


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
        images: of each kernel, for each GPU that has it.
    """
    every = sorted({*archs, *ptx_archs})
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.cubin"), *folder.glob("*.xz"), *folder.glob(NAME)):
        old.unlink()
    files: dict[str, Any] = {}
    for arch in archs:
        own = [images.get((key, arch)) for key in wanted]
        parts = [b"" if image is None else image.cubin for image in own]
        files[f"sm_{arch}.cubin"] = _write(folder / f"sm_{arch}.cubin", arch, parts, own)
    for arch in ptx_archs:
        name = f"compute_{arch}.ptx.xz"
        own = [images.get((key, arch)) for key in wanted]
        parts = [b"" if image is None else image.ptx + b"\0" for image in own]
        files[name] = _write(folder / name, arch, parts, own)
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
    return {
        "name": key.name,
        "key": key.number,
        "entry": first.entry,
        # One text: a list of lists would take the collector of garbage 60 ms when it is read.
        "arguments": " ".join(f"{name}:{size}" for name, size in first.arguments),
        "warps": key.warps,
        "batch": key.batch,
        "blocks": key.blocks,
    }


def _write(
    file: Path, arch: int, parts: Sequence[bytes], images: Sequence[Image | None]
) -> dict[str, Any]:
    """Write the images of a GPU; return what the manifest says of the file."""
    content, places = b"", []
    for image, part in zip(images, parts, strict=True):
        places.append([len(content), len(part), image.shared if image else 0])
        content += part + b"\0" * (-len(part) % _ALIGNMENT)
    stored = lzma.compress(content, preset=9) if file.suffix == ".xz" else content
    file.write_bytes(stored)
    return {
        "arch": arch,
        "bytes": len(stored),
        "unpacked": len(content),
        "sha256": sha256(stored).hexdigest(),
        # Of each kernel: where it begins, its bytes, bytes of shared memory; no bytes where
        # these GPUs do not have it.
        "places": places,
    }
