"""One instruction on its way to Python, and the table of opcodes.

Registers keep bits: %rs uint16, %r and %f uint32, %rd uint64, %p bool, an array [threads] each,
under their own names without the %. Operands are the PTX ISA's "Instruction Operands".
"""

import re
from collections import defaultdict
from collections.abc import Callable

from .faults import Unknown
from .parse import operands

BITS = {1: "np.uint8", 2: "U16", 4: "U32", 8: "U64"}  # by bytes
_SIGNED = {"16": "np.int16", "32": "np.int32", "64": "np.int64"}

Lines = list[str]


class Instruction:
    """Its parts, and the Python that its operands become.

    `parts` are the opcode and its modifiers, the last of them the type; `guard` is the Python of
    its guard, "" without one; `mask` that of the threads that execute it, "None" if all do;
    `where` is a Python string that says where a fault was. `divided`: only the threads ACT are
    there.
    """

    def __init__(self, text: str, labels: dict[str, int], divided: bool = False) -> None:
        self.labels, self.divided = labels, divided
        guarded = re.match(r"@(!?)%(p\d+)\s+(.*)", text, re.S)
        self.guard = ("~" if guarded[1] else "") + guarded[2] if guarded else ""
        self.mask = " & ".join(["ACT"] * divided + [self.guard] * bool(guarded)) or "None"
        self.text = guarded[3] if guarded else text
        opcode, *rest = self.text.split(None, 1)
        self.operands = operands(rest[0]) if rest else []
        self.parts = opcode.split(".")
        self.opcode, self.type = self.parts[0], self.parts[-1]
        self.where = repr(self.text[:90])

    @property
    def masked(self) -> bool:
        """Whether only some of the threads may execute it."""
        return self.mask != "None"

    @property
    def word(self) -> str:
        """The numpy type of registers of its type."""
        return "U64" if "64" in self.type else "U16" if "16" in self.type else "U32"

    @property
    def vector(self) -> int:
        """How many registers it moves."""
        return next((int(part[1:]) for part in self.parts if re.fullmatch(r"v\d", part)), 1)

    def unknown(self) -> Unknown:
        """What is raised where the emulator has not learned it."""
        return Unknown(f"the emulator does not know {self.text[:90]!r}")

    def value(self, operand: str, kind: str | None = None) -> str:
        """The bits of an operand; `kind` is a type as wide as they are."""
        kind = kind or self.type
        if re.fullmatch(r"%(p|rs|rd|r|f)\d+", operand):
            return operand[1:]
        if special := _special(operand):
            return special
        if operand == "global_smem":
            return "SMEM64" if "64" in kind else "SMEM"
        if operand.startswith("0f"):
            return f"U32({int(operand[2:], 16)})"
        try:
            number = int(operand.rstrip("U"), 0)
        except ValueError:
            raise self.unknown() from None
        width = 64 if "64" in kind else 16 if "16" in kind else 32
        return f"U{width}({number % 2**width})"

    def signed(self, operand: str) -> str:
        """An operand as signed numbers of the instruction's width."""
        return f"np.asarray({self.value(operand)}).view({self.signed_type})"

    @property
    def signed_type(self) -> str:
        """The numpy type of its signed numbers."""
        return _SIGNED[self.type[1:]]

    def single(self, operand: str) -> str:
        """An operand as float32."""
        return f"np.asarray({self.value(operand, 'b32')}).view(F32)"

    def spread(self, operand: str, kind: str | None = None) -> str:
        """The bits of an operand, one for each thread even if it is a constant."""
        return f"np.broadcast_to({self.value(operand, kind)}, (N,))"

    def address(self, operand: str, wide: bool) -> str:
        """`[register + offset]`, in 64 bits or 32."""
        base, _, offset = (part.strip() for part in operand[1:-1].strip().partition("+"))
        width = 64 if wide else 32
        if base.isdecimal():
            return f"np.full(N, {int(base) + int(offset or '0')}, U{width})"
        if not base.startswith("%") and base != "global_smem":
            raise self.unknown()
        found = "SMEM" if base == "global_smem" else base[1:]
        move = int(offset or "0")
        return f"({found} + U{width}({move % 2**width}))" if move else found

    def assign(self, register: str, expression: str) -> Lines:
        """Write a register, where the guard allows it."""
        name = register[1:]
        if self.masked:
            expression = f"np.where({self.mask}, {expression}, {name})"
        return [f"{name} = {expression}"]

    def assign_all(self, group: str, expression: str) -> Lines:
        """Write the registers of `{...}`, where the guard allows it."""
        if not self.masked:
            return [f"{listed(group)} = {expression}"]
        lines = [f"_r = {expression}"]
        for number, name in enumerate(names(group)):
            lines += self.assign(name, f"_r[{number}]")
        return lines


def _special(operand: str) -> str | None:
    """Special registers: "Special Registers" of the PTX ISA."""
    if operand in ("%tid.x", "%ntid.x"):
        return "TID" if operand == "%tid.x" else "np.full(N, N, U32)"
    if found := re.fullmatch(r"%(n?ctaid)\.([xyz])", operand):
        return f"{found[1].upper()}_{found[2]}"
    if found := re.fullmatch(r"%clusterid\.([xyz])", operand):  # clusters lie along x
        axis = "xyz".index(found[1])
        return f"np.full(N, block.index[{axis}]{' // block.cluster.size' * (axis == 0)}, U32)"
    return "np.full(N, block.rank, U32)" if operand == "%cluster_ctarank" else None


def names(group: str) -> list[str]:
    """The registers of `{...}`, or of one that stands alone."""
    return operands(group[1:-1]) if group.startswith("{") else [group]


def listed(group: str) -> str:
    """A Python list of the registers of `{...}`."""
    return f"[{', '.join(name[1:] for name in names(group))}]"


def width_of(register: str) -> int:
    """Bits of a register."""
    return {"%rs": 16, "%rd": 64}.get(register[:3], 32)


Handler = Callable[[Instruction], Lines | None]
Expression = Callable[[Instruction], str | None]
_OPCODES: dict[str, list[Handler]] = defaultdict(list)


def opcode(*bases: str) -> Callable[[Handler], Handler]:
    """Register a function that makes the lines of opcodes; None of a form that is not its own."""

    def register(function: Handler) -> Handler:
        for base in bases:
            _OPCODES[base].append(function)
        return function

    return register


def expression(*bases: str) -> Callable[[Expression], Expression]:
    """Register a function that makes the new value of the first operand; or None, as above."""

    def register(function: Expression) -> Expression:
        def lines(i: Instruction) -> Lines | None:
            found = function(i)
            return None if found is None else i.assign(i.operands[0], found)

        opcode(*bases)(lines)
        return function

    return register


def lines_of(text: str, labels: dict[str, int], divided: bool = False) -> Lines:
    """The Python of an instruction; `divided`: of one that only the threads ACT execute.

    Raises:
        Unknown: the emulator has not learned it.
    """
    i = Instruction(text, labels, divided)
    for handler in _OPCODES.get(i.opcode, ()):
        lines = handler(i)
        if lines is not None:
            return lines
    raise i.unknown()
