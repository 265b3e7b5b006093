"""What a kernel for a GPU takes, by the cubin itself: the table that a driver reads."""

import struct

_PARAMETER = 0x17  # EIATTR_KPARAM_INFO
_WITH_SIZE = 4  # format of an attribute that has so many bytes more


def sections(cubin: bytes) -> dict[str, bytes]:
    """The sections of an ELF file of 64 bits."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + k * size) for k in range(count)]
    texts = headers[names][4]
    found = {}
    for name, _, _, _, begin, length in headers:
        end = cubin.index(b"\0", texts + name)
        found[cubin[texts + name : end].decode()] = cubin[begin : begin + length]
    return found


def parameters(cubin: bytes, entry: str) -> list[int]:
    """The bytes of each parameter of a function, in order."""
    table, at, found = sections(cubin)[f".nv.info.{entry}"], 0, {}
    while at < len(table):
        kind, attribute, size = struct.unpack_from("<BBH", table, at)
        at += 4
        if kind != _WITH_SIZE:
            continue
        if attribute == _PARAMETER:
            _, ordinal, _, packed = struct.unpack_from("<IHHI", table, at)
            found[ordinal] = packed >> 18
        at += size
    return [found[ordinal] for ordinal in sorted(found)]
