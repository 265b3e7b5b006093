"""Which kernels C++ starts, compiled ahead or when called, and what tells one from another.

What shapes the code is compiled in: tiles, the kind of number, what a call has. T, B, I, H,
strides, directions and absent tensors, which are null, come at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log2
from typing import Any, NamedTuple

from fastlstm.kernels.triton.input_products import reads_odd, tile
from fastlstm.kernels.triton.register_plans import sequences
from fastlstm.kernels.triton.weight_gradients import PARTS, tiles

from .plans import ANY, KINDS, REGIMES, Row, element_and_precision

__all__ = ["KERNELS", "ROWS", "Key", "described", "general", "keys"]

# What kernels do: a pass in a regime, the two steps to gradients of weights, or input products.
KERNELS = (*REGIMES, "parts", "sums", "inputs")

ROWS = ("dense", "padded", "packed")
# Both kinds of weights in registers, read number by number: more spill hundreds of bytes.
_MOST_ODD_UNITS = 32  # of ragged rows
_MOST_ODD_UNITS_DENSE, _MOST_ODD_WEIGHTS = 64, 64 * 32  # units; units times inputs
_ODD_INPUTS = 32  # the narrowest tile, where there are wider ones
_INPUTS_OF_PARTS = 64  # the tile of I, whatever I is: loads past its end cost next to nothing


class Key(NamedTuple):
    """What a kernel is compiled for."""

    back: bool
    regime: str  # of KERNELS
    kind: str
    units: int
    batch: int  # sequences; of "inputs" and "parts" rows, of "sums" parts at a time
    inputs: int  # the tile of I; 0 where products are made before
    warps: int
    rows: str  # "dense"; "padded", with lengths, resets and gradients of c; "packed"
    keeps: bool  # forward: whether c and gates are written; backward: whether gates were kept
    even: bool  # whether H divides by 8, I by 2, and tensors are aligned; of "inputs" I by 4
    blocks: int = 1  # of a cluster

    @property
    def name(self) -> str:
        """A name for people and messages."""
        tile = f"u{self.units}n{self.batch}" + f"i{self.inputs}" * (self.inputs > 0)
        tile += f"c{self.blocks}" * (self.blocks > 1)
        flags = "-keeps" * self.keeps + "-even" * self.even
        direction = "bwd" if self.back else "fwd"
        return f"lstm_{direction}_{self.regime}-{self.kind}-{tile}-{self.rows}{flags}"

    @property
    def number(self) -> int:
        """The same as one number, as csrc/triton/kernels.cpp makes it."""
        found = 0
        for value, bits in (
            (int(self.back), 1),
            (KERNELS.index(self.regime), 3),
            (KINDS.index(self.kind), 2),
            (int(log2(self.units)), 4),
            (int(log2(self.batch)), 4),
            (int(log2(self.inputs or 1)), 4),
            (ROWS.index(self.rows), 2),
            (int(self.keeps), 1),
            (int(self.even), 1),
            (int(log2(self.blocks)), 3),
        ):
            found = found << bits | value
        return found


def described(key: Key, entry: str, arguments: list[tuple[str, int]]) -> dict[str, Any]:
    """Describe a kernel as a manifest does: by its function, and names and bytes of arguments."""
    return {
        "name": key.name,
        "key": key.number,
        "entry": entry,
        # One text: a list of lists would take the collector of garbage 60 ms when it is read.
        "arguments": " ".join(f"{name}:{size}" for name, size in arguments),
        "warps": key.warps,
        "batch": key.batch,
        "blocks": key.blocks,
    }


def keys(rows: list[Row]) -> list[Key]:
    """Return the kernels that plans with these rows may start.

    Whatever has no kernel of its own takes one that can do more: of even sizes one for all sizes,
    of few inputs one for many, or one whose products are made before, of few sequences one for
    many, of odd sizes one that keeps c and gates. So only calls as they mostly are have the one
    that is best for them. Input products without a kernel are left to PyTorch.
    """
    found = [key for row in rows for key in _keys(row, rows)]
    found += (key for row in rows for key in (*_of_weights(row), *_of_inputs(row)))
    return list(dict.fromkeys(found))


def general(found: list[Key]) -> list[Key]:
    """Return the kernels without which some calls have none.

    Left out are those for few sequences, those for few inputs, those for odd sizes whose rows are
    dense, and for gradients of weights those for even sizes. Such calls take a kernel for more,
    for padded rows or for all sizes: slower, and as right. Input products are left to PyTorch.
    """
    numbers = {key.number for key in found}
    return [key for key in found if _is_general(key, numbers)]


def _is_general(key: Key, numbers: set[int]) -> bool:
    if key.regime != "registers":
        return key.regime != "inputs" and not (key.regime == "parts" and key.even)
    wider = (key._replace(inputs=n).number for n in (32, 64) if 0 < key.inputs < n)
    if numbers.intersection(wider) or key.batch < sequences(element_and_precision(key.kind)[1])[1]:
        return False
    return key.rows != "dense" or key.even or key.kind == "exact"


def _keys(row: Row, rows: list[Row]) -> Iterator[Key]:
    back, regime, kind = bool(row.back), REGIMES[row.regime], KINDS[row.kind]
    tile = row.units, row.batch, row.inputs, row.warps
    key = Key(back, regime, kind, *tile, "", True, False, row.blocks)
    if row.blocks > 1:
        yield from _of_cluster(key)
        return
    exact = kind == "exact"  # whose threads read and write as much where sizes are even
    even = key._replace(even=not exact)
    if not back:
        yield even._replace(rows="dense", keeps=False)
    yield even._replace(rows="dense")
    widest = _widest(row, rows)
    if not exact and (not row.inputs or _is_odd_tile(row, widest)):
        yield key._replace(rows="dense")
    if row.batch < sequences(element_and_precision(kind)[1])[1]:
        return
    yield from (even._replace(rows=form) for form in ("padded", "packed"))
    if row.inputs and (row.inputs < widest or row.units > _MOST_ODD_UNITS):
        return
    for form in ("padded", "packed"):
        yield key._replace(rows=form)
        if back:
            yield key._replace(rows=form, keeps=False)


def _of_cluster(key: Key) -> Iterator[Key]:
    """Yield the kernels of a cluster: for even sizes only those of dense rows."""
    if not key.back:
        for keeps, even in ((False, True), (True, True), (True, False)):
            yield key._replace(rows="dense", keeps=keeps, even=even)
        yield from (key._replace(rows=form) for form in ("padded", "packed"))
        return
    yield from (key._replace(rows="dense", even=even) for even in (True, False))
    for form in ("padded", "packed"):
        yield from (key._replace(rows=form, keeps=keeps) for keeps in (True, False))


def _of_weights(row: Row) -> Iterator[Key]:
    """Yield the kernels for the gradients of weights that follow the backward pass of a row."""
    if not row.back:
        return
    kind = KINDS[row.kind]
    cut = tiles(_INPUTS_OF_PARTS, row.units, element_and_precision(kind)[0])
    batch, warps = cut.plan.batch, cut.plan.warps
    # More units take more tiles of states.
    parts = Key(
        True, "parts", kind, min(row.units, cut.h), batch, cut.x, warps, "dense", True, True
    )
    yield from (parts, parts._replace(even=False))
    yield Key(True, "sums", kind, 16, PARTS, 0, 4, "dense", True, False)


def _of_inputs(row: Row) -> Iterator[Key]:
    """Yield the kernels for the input products of a row whose loop does not make them."""
    if row.back or row.inputs:
        return
    kind = KINDS[row.kind]
    element, precision = element_and_precision(kind)
    cut = tile(element, precision)
    key = Key(False, "inputs", kind, 16, cut.rows, 0, cut.plan.warps, "dense", False, False)
    if precision != "ieee":  # whose time is that of its products
        yield key._replace(even=True)
    if reads_odd(element):
        yield key


def _is_odd_tile(row: Row, widest: int) -> bool:
    """Return whether a tile of inputs has a kernel for odd sizes, of dense rows."""
    fits = row.units * row.inputs <= _MOST_ODD_WEIGHTS and row.units <= _MOST_ODD_UNITS_DENSE
    return fits and row.inputs >= min(_ODD_INPUTS, widest)


def _widest(row: Row, rows: list[Row]) -> int:
    """Return the widest tile of inputs among plans that are otherwise like this one."""
    alike = (each for each in rows if each[:3] == row[:3] and each.most_inputs < ANY)
    return max((each.inputs for each in alike), default=0)
