"""What a library of Linux needs from others, as its ELF file says: a wheel's tag follows."""

import struct
from pathlib import Path
from typing import NamedTuple

_MACHINES = {62: "x86_64", 183: "aarch64"}
_DYNAMIC_SYMBOLS, _NEEDED_VERSIONS, _SYMBOL_VERSIONS = 11, 0x6FFFFFFE, 0x6FFFFFFF  # section types

# manylinux_2_N promises a glibc of 2.N, and then a libstdc++ that has GLIBCXX_3.4.M (PEP 600).
# torch itself needs the first of these.
_PROMISES = {28: 24, 31: 28, 34: 29, 35: 30, 39: 33}


class Symbol(NamedTuple):
    """A symbol that another library has to define, and the version that it must have, or ""."""

    name: str
    version: str


class _Section(NamedTuple):
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int  # the section that has its names


class Library:
    """A shared library of 64 bits, little-endian.

    Attributes:
        machine: "x86_64" or "aarch64".
        symbols: what it needs from other libraries.

    Raises:
        ValueError: the file is none of these.
    """

    def __init__(self, file: Path) -> None:
        self._data = data = file.read_bytes()
        number = int.from_bytes(data[18:20], "little")
        if data[:6] != b"\x7fELF\x02\x01" or number not in _MACHINES:
            known = ", ".join(_MACHINES.values())
            raise ValueError(f"{file} is not an ELF file of one of these machines: {known}")
        self.machine = _MACHINES[number]
        table, (size, count) = self._unpack("<Q", 40)[0], self._unpack("<HH", 58)
        self._sections = [
            _Section(*self._unpack("<IQQQQI", table + k * size + 4)) for k in range(count)
        ]
        self.symbols = self._read_symbols()

    def newest(self, family: str) -> tuple[int, ...]:
        """The newest version of a family, such as "GLIBC", that a symbol needs; () without any."""
        numbers = (
            symbol.version.removeprefix(f"{family}_").split(".")
            for symbol in self.symbols
            if symbol.version.startswith(f"{family}_")
        )
        return max((tuple(map(int, parts)) for parts in numbers), default=())

    def _unpack(self, layout: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(layout, self._data, at)

    def _section(self, kind: int) -> _Section | None:
        return next((section for section in self._sections if section.kind == kind), None)

    def _name(self, owner: _Section, at: int) -> str:
        begin = self._sections[owner.link].offset + at
        return self._data[begin : self._data.index(b"\0", begin)].decode()

    def _versions(self) -> dict[int, str]:
        """The names of versions, by the index that symbols have them by."""
        names: dict[int, str] = {}
        section = self._section(_NEEDED_VERSIONS)
        library = section.offset if section else 0
        while section:
            _, count, _, version, following = self._unpack("<HHIII", library)
            version += library
            for _ in range(count):
                _, _, index, name, step = self._unpack("<IHHII", version)
                names[index & 0x7FFF] = self._name(section, name)
                version += step
            if not following:
                break
            library += following
        return names

    def _read_symbols(self) -> list[Symbol]:
        section, indices = self._section(_DYNAMIC_SYMBOLS), self._section(_SYMBOL_VERSIONS)
        versions, found = self._versions(), []
        for k in range(section.size // 24 if section else 0):
            name, _, _, defined_in = self._unpack("<IBBH", section.offset + k * 24)
            if name and not defined_in:
                (index,) = self._unpack("<H", indices.offset + k * 2) if indices else (0,)
                found.append(Symbol(self._name(section, name), versions.get(index & 0x7FFF, "")))
        return found


def is_elf(file: Path) -> bool:
    """Whether there is such a file, and it is an ELF file."""
    return file.exists() and file.read_bytes()[:4] == b"\x7fELF"


def platform_tag(libraries: list[Library]) -> str:
    """Return the oldest platform, as wheels name it, that has what all of some libraries need."""
    for glibc, glibcxx in _PROMISES.items():
        if all(
            each.newest("GLIBC") <= (2, glibc) and each.newest("GLIBCXX") <= (3, 4, glibcxx)
            for each in libraries
        ):
            return f"manylinux_2_{glibc}_{libraries[0].machine}"
    return f"linux_{libraries[0].machine}"
