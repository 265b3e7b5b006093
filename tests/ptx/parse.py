"""Reading a kernel in PTX: its parameters, its directives, its instructions."""

import re
from dataclasses import dataclass
from typing import NamedTuple

PARAMETERS = 1 << 30  # the address of the first parameter
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+")


class Parameter(NamedTuple):
    """Where a parameter lies, from PARAMETERS on; in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Source:
    """A kernel as text."""

    name: str
    parameters: list[Parameter]
    threads: int | None  # of a block; None: any number
    cluster: int  # blocks of a cluster, along x
    lines: list[tuple[str, str]]  # ("label", name) or ("op", instruction)


def parse(ptx: str, name: str) -> Source:
    """Read a kernel of a module."""
    head, body = ptx[ptx.index(f".visible .entry {name}(") :].split("{", 1)
    threads = re.search(r"\.reqntid (\d+)", head)
    cluster = re.search(r"\.reqnctapercluster (\d+)", head)
    body = re.split(r"\$L__func_end|\.visible \.entry", body)[0]
    for memory in re.findall(r"\.extern \.shared .*?(\w+)\[\]", ptx):
        body = body.replace(memory, "global_smem")
    parameters = _parameters(head)
    for number, parameter in enumerate(parameters):
        address = str(PARAMETERS + parameter.offset)
        body = re.sub(rf"\b{name}_param_{number}\b", address, body)
    return Source(
        name,
        parameters,
        int(threads[1]) if threads else None,
        int(cluster[1]) if cluster else 1,
        _lines(body),
    )


def _parameters(head: str) -> list[Parameter]:
    """Numbers, and structures: `.param .align 8 .b8 name[280]`."""
    found, at = [], 0
    for text in re.findall(r"\.param([^,)]*)", head):
        bits = re.search(r"\.[busf](\d+)", text)
        count, align = re.search(r"\[(\d+)\]", text), re.search(r"\.align (\d+)", text)
        assert bits, text
        size = int(count[1]) if count else int(bits[1]) // 8
        step = int(align[1]) if count and align else size
        at = -(-at // step) * step
        found.append(Parameter(at, size))
        at += size
    return found


def _lines(body: str) -> list[tuple[str, str]]:
    lines = []
    text = re.sub(r"//[^\n]*", "", body).replace("shared::cta", "shared")  # the same window
    text = re.sub(r"(?<![\w%.$])p(?![\w.])", "%p0", text)  # of device.h, in a scope of its own
    for line in map(str.strip, text.split("\n")):
        if not line or line.startswith((".", "}")):
            continue
        if line.startswith("$"):
            if line.endswith(":"):
                lines.append(("label", line[:-1]))
            continue
        for one in map(str.strip, line.split(";")):
            if one and not one.startswith(".") and not _is_scaffold(one):
                lines.append(("op", one))
    return lines


def _is_scaffold(text: str) -> bool:
    """Whether it belongs to the loop that Triton writes around a try_wait, which waits here."""
    return text in ("{", "}", "waitLoop:") or text.startswith("@!complete")


def operands(text: str) -> list[str]:
    """Split operands: `{...}` and `[...]` are one each."""
    return [found.strip() for found in _OPERAND.findall(text) if found.strip()]
