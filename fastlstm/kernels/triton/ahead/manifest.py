"""The manifest of compiled kernels: reading it, and saying what is wrong with it.

Needs no Triton. A folder of kernels is data that a program will run: whatever does not fit this
library, is not whole or is not what it says is refused, with a sentence.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ARCHS",
    "FOLDER",
    "FORMAT",
    "NAME",
    "PTX_ARCHS",
    "Manifest",
    "ManifestError",
    "sources",
]

FORMAT = 1
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
    "unpacked": int,
    "sha256": str,
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

    def file_for(self, arch: int) -> str | None:
        """Return the name of the file whose kernels a GPU of that capability runs, or None.

        Code goes before PTX, and what is made for a newer GPU before what is for an older one.
        """
        found = [
            (name.endswith(".cubin"), about["arch"], name)
            for name, about in self.files.items()
            if _runs(about["arch"], name.endswith(".cubin"), arch)
        ]
        return max(found)[-1] if found else None

    def archs(self) -> str:
        """Return the GPUs for which there are kernels, in words."""
        code = sorted(about["arch"] for n, about in self.files.items() if n.endswith(".cubin"))
        ptx = sorted(about["arch"] for n, about in self.files.items() if n.endswith(".xz"))
        names = [*(f"sm_{arch}" for arch in code), *(f"PTX of sm_{arch}" for arch in ptx)]
        return ", ".join(names)

    def content(self, name: str) -> Tensor:
        """Return the kernels of a file, uint8; they are not read before they are used.

        Raises:
            ManifestError: the file is damaged.
        """
        file, about = self.folder / name, self.files[name]
        if name.endswith(".cubin"):
            return torch.from_file(str(file), False, about["bytes"], dtype=torch.uint8)
        try:
            unpacked = lzma.decompress(file.read_bytes())
        except lzma.LZMAError as error:
            raise ManifestError(f"{name} is damaged: {error}") from None
        return torch.frombuffer(bytearray(unpacked), dtype=torch.uint8)

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
    ends = [begin + count for begin, count, _ in about["places"]]
    if len(ends) != kernels or max(ends, default=0) > about["unpacked"]:
        raise ManifestError(f"{file.name} does not have {kernels} kernels")
