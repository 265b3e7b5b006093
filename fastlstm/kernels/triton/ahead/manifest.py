"""The manifest of compiled kernels: reading it, and saying what is wrong with it.

Needs no Triton. A folder of kernels is data that a program will run: whatever does not fit this
library, is not whole or is not what it says is refused, with a sentence.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

__all__ = [
    "ARCHS",
    "FOLDER",
    "FORMAT",
    "NAME",
    "PTX_ARCHS",
    "Manifest",
    "ManifestError",
    "is_code",
    "sources",
]

FORMAT = 2
NAME = "manifest.json"
FOLDER = Path(__file__).parent / "built"
# A GPU runs code of the same major and a lower or equal minor version: sm_80 serves 8.6 and 8.9,
# from which the kernels want nothing more. What Triton compiles from 9.0 on is for that GPU alone.
ARCHS = (80, 90, 100)
PTX_ARCHS = (80,)
_EXACT = 90
_KERNELS = Path(__file__).parents[1]
_FIELDS: dict[str, type] = {
    "format": int,
    "triton": str,
    "sources": str,
    "files": dict,
    "plans": dict,
    "kernels": list,
}
_OF_KERNEL: dict[str, type] = {
    "name": str,
    "key": int,
    "entry": str,
    "arguments": str,  # "name:bytes", in order
    "warps": int,
    "batch": int,
    "blocks": int,
}
_OF_FILE: dict[str, type] = {
    "arch": int,
    "bytes": int,
    "sha256": str,
    "groups": list,
    "places": list,
}


class ManifestError(RuntimeError):
    """There are no kernels that can be used; says why."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of compiled kernels holds."""

    folder: Path
    triton: str  # its version
    files: dict[str, Any]
    plans: dict[int, list[list[int]]]
    kernels: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a folder.

        Raises:
            ManifestError: it is missing, damaged, or of other kernels than this library's.
        """
        file = folder / NAME
        if not file.exists():
            raise ManifestError("the kernels were not compiled when fastlstm was built")
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ManifestError(f"{NAME} is damaged: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ManifestError(f"{NAME} is not a list of kernels that this fastlstm knows")
        _check(found, _FIELDS, NAME)
        if found["sources"] != sources():
            raise ManifestError("the compiled kernels are of another version of fastlstm")
        for number, kernel in enumerate(found["kernels"]):
            _check(kernel, _OF_KERNEL, f"kernel {number} in {NAME}")
        for name, about in found["files"].items():
            _check(about, _OF_FILE, f"{name} in {NAME}")
            _check_file(folder / name, about, len(found["kernels"]))
        plans = {int(arch): rows for arch, rows in found["plans"].items()}
        return cls(folder, found["triton"], found["files"], plans, found["kernels"])

    @cached_property
    def places(self) -> dict[int, int]:
        """Where each kernel stands in the list, by its key."""
        return {kernel["key"]: place for place, kernel in enumerate(self.kernels)}

    def file_for(self, arch: int) -> str | None:
        """Return the name of the file whose kernels a GPU of that capability runs, or None.

        Code goes before PTX, and what is made for a newer GPU before what is for an older one.
        """
        found = [
            (is_code(name), about["arch"], name)
            for name, about in self.files.items()
            if _runs(about["arch"], is_code(name), arch)
        ]
        return max(found)[-1] if found else None

    def archs(self) -> str:
        """Return the GPUs for which there are kernels, in words."""
        code = sorted(about["arch"] for n, about in self.files.items() if is_code(n))
        ptx = sorted(about["arch"] for n, about in self.files.items() if not is_code(n))
        names = [*(f"sm_{arch}" for arch in code), *(f"PTX of sm_{arch}" for arch in ptx)]
        return ", ".join(names)

    def image(self, name: str, kernel: int) -> tuple[bytes, int]:
        """Read a kernel of a file.

        Returns:
            the code, and the bytes of shared memory of a block.

        Raises:
            ManifestError: the file is damaged.
        """
        group, begin, count, shared = self.files[name]["places"][kernel]
        together = _unpacked(self.folder / name, *self.files[name]["groups"][group])
        if begin + count > len(together):
            raise ManifestError(f"{name} is damaged: kernel {kernel} is not whole")
        return together[begin : begin + count], shared

    def damaged(self) -> str | None:
        """Say which file is not what was built; None if all are. Reads all of them."""
        for name, about in self.files.items():
            if sha256((self.folder / name).read_bytes()).hexdigest() != about["sha256"]:
                return f"{name} is not what the manifest says"
        return None


@cache
def sources() -> str:
    """Return a digest of what kernels are made of and what starts them."""
    found = sha256()
    for file in sorted([*_KERNELS.glob("*.py"), *_KERNELS.glob("ahead/*.py")]):
        found.update(f"{file.name}\n".encode() + file.read_bytes())
    return found.hexdigest()


@lru_cache(maxsize=2)  # the other kernels of a call are mostly neighbours
def _unpacked(file: Path, begin: int, count: int) -> bytes:
    """Read what was compressed together."""
    try:
        with file.open("rb") as opened:
            opened.seek(begin)
            return lzma.decompress(opened.read(count))
    except (OSError, lzma.LZMAError) as error:
        raise ManifestError(f"{file.name} is damaged: {error}") from None


def is_code(name: str) -> bool:
    """Return whether a file has code, not PTX."""
    return name.endswith(".cubin.xz")


def _runs(arch: int, code: bool, gpu: int) -> bool:
    """Return whether a GPU runs code, or PTX, that was compiled for `arch`."""
    if arch >= _EXACT:
        return arch == gpu
    return arch <= gpu and (not code or arch // 10 == gpu // 10)


def _check(found: Any, fields: dict[str, type], what: str) -> None:
    """Raise unless all fields are there, of their types."""
    for name, kind in fields.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise ManifestError(f"{what} has no {name}, or one that is no {kind.__name__}")


def _check_file(file: Path, about: dict[str, Any], kernels: int) -> None:
    """Raise unless a file is as long as it was, and has all kernels."""
    size = file.stat().st_size if file.exists() else 0
    if size != about["bytes"]:
        raise ManifestError(f"{file.name} has {size:,} bytes instead of {about['bytes']:,}")
    groups, places = about["groups"], about["places"]
    ends = [begin + count for begin, count in groups]
    known = all(group < len(groups) for group, _, count, _ in places if count)
    if len(places) != kernels or max(ends, default=0) > size or not known:
        raise ManifestError(f"{file.name} does not have {kernels} kernels")
