"""Reading a kernel in PTX: its parameters, its directives, its instructions."""

import re
from dataclasses import dataclass

_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+")


@dataclass(frozen=True)
class Source:
    """A kernel as text."""

    name: str
    parameters: int  # how many
    threads: int  # of a block
    cluster: int  # blocks of a cluster, along x
    lines: list[tuple[str, str]]  # ("label", name) or ("op", instruction)


def parse(ptx: str, name: str) -> Source:
    """Read the first kernel of a module."""
    head, body = ptx[ptx.index(".visible .entry") :].split("{", 1)
    cluster = re.search(r"\.reqnctapercluster (\d+)", head)
    body = body[: body.index("$L__func_end0")] if "$L__func_end0" in body else body
    return Source(
        name,
        len(re.findall(r"\.param\s+\.\w+[^,\n)]*?\w+_param_\d+", head)),
        int(_threads(head)),
        int(cluster[1]) if cluster else 1,
        _lines(body),
    )


def _threads(head: str) -> str:
    found = re.search(r"\.reqntid (\d+)", head)
    assert found, "the emulator needs .reqntid, the number of threads"
    return found[1]


def _lines(body: str) -> list[tuple[str, str]]:
    lines = []
    text = re.sub(r"//[^\n]*", "", body).replace("shared::cta", "shared")  # the same window
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
