"""`python -m fastlstm.kernels.triton.ahead build|check [FOLDER]`: kernels compiled ahead."""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path

from .manifest import ARCHS, FOLDER, PTX_ARCHS, Manifest, ManifestError


def main(arguments: list[str] | None = None) -> int:
    """Build the kernels, or check those that are there; return the status of the process."""
    parser = argparse.ArgumentParser("fastlstm.kernels.triton.ahead", description=__doc__)
    parser.add_argument("action", choices=("build", "check"))
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--arch", nargs="*", type=int, default=ARCHS, help="that get code")
    parser.add_argument("--ptx", nargs="*", type=int, default=PTX_ARCHS, help="that get PTX")
    parser.add_argument("--processes", type=int, help="that compile at the same time")
    chosen = parser.parse_args(arguments)
    if chosen.action == "build":
        from .build import BuildError, build  # which needs Triton

        try:
            build(chosen.folder, chosen.arch, chosen.ptx, chosen.processes)
        except BuildError as error:
            print(error, file=sys.stderr)
            return 1
    try:
        manifest = Manifest.read(chosen.folder)
    except ManifestError as error:
        print(error, file=sys.stderr)
        return 1
    print(_described(manifest))
    damage = manifest.damaged()
    print(damage or "all files are whole")
    return int(damage is not None)


def _described(manifest: Manifest) -> str:
    """Return a table of the files, and their sizes in a wheel."""
    lines = [f"{len(manifest.kernels)} kernels, Triton {manifest.triton}: {manifest.archs()}"]
    total = 0
    for name in ("manifest.json", *manifest.files):
        content = (manifest.folder / name).read_bytes()
        packed = len(zlib.compress(content))
        total += packed
        lines.append(f"{name:24}{len(content):14,} bytes,{packed:12,} in a wheel")
    return "\n".join([*lines, f"{'':43}{total:12,} in a wheel"])


if __name__ == "__main__":
    sys.exit(main())
