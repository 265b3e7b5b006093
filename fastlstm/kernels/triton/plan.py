"""What a plan is, and what it depends on: the words of the files that choose one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastlstm.spec import LayerSpec

__all__ = ["Device", "Plan", "Problem", "compiler_options", "padded"]

# Kilobytes of shared memory one program may use, by compute capability.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}
_SHARED_ELSEWHERE = 99
_OF_A_GROUP = 18  # multiprocessors, among which a cluster stays: the most that GPUs have
_MOST_REGISTERS = 255  # of a thread
_SMALLEST_DOT = 16  # rows and columns of a matrix instruction


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    arch: int  # compute capability, 10 * major + minor
    processors: int  # streaming multiprocessors
    gluon: bool = True  # whether Triton has Gluon and does not interpret
    clusters: bool = True  # whether its Gluon also sends numbers through a cluster
    # How many clusters of 1, 2, 4, 8 and 16 blocks there is room for at a time, by the driver.
    together: tuple[int, ...] = ()

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may use."""
        return _SHARED.get(self.arch, _SHARED_ELSEWHERE) * 1024

    def at_once(self, blocks: int) -> int:
        """Return how many clusters of so many blocks are on the GPU together, at least.

        A block takes a multiprocessor. Where the driver was not asked, groups are of the largest
        size, and the multiprocessors that are left over stay empty.
        """
        if self.together:
            return self.together[blocks.bit_length() - 1]
        return self.processors // _OF_A_GROUP * (_OF_A_GROUP // blocks)


class Problem(NamedTuple):
    """What a plan needs to know of a call. T is not part of it: no plan depends on it."""

    spec: LayerSpec
    B: int
    element: int  # bytes of a number of x and the weights: 2 or 4
    precision: str  # of float32 products: "tf32" or "ieee"; "tf32" for 16-bit numbers too
    dense: bool = True  # whether all sequences have all steps, and none is reset

    @property
    def cell(self) -> str:
        """The kind of cell.

        It is "plain", or "extended" with more numbers to hold in registers, or "normalised" with
        sums over all units as well.
        """
        if self.spec.layer_norm:
            return "normalised"
        return "extended" if self.spec.is_extended else "plain"

    def __str__(self) -> str:
        spec = self.spec
        numbers = "16 bit" if self.element == 2 else f"float32 ({self.precision})"
        return (
            f"I = {spec.input_size}, H = {spec.hidden_size}, P = {spec.state_size}, "
            f"D = {spec.directions}, B = {self.B}, {self.cell} cell, {numbers}"
        )


@dataclass(frozen=True)
class Plan:
    """A regime and its tiles."""

    regime: str  # "registers", "sequence", "cluster", "steps"; "weights": gradients
    units: int  # units of a program: the tile is four times as high; 16 or more
    batch: int  # sequences of a program
    chunk: int  # terms of the product loaded at a time; covers P where the weights stay on chip
    fused: bool  # x goes through w_ih in the loop, and not in one product ahead of it
    warps: int
    stages: int  # of the pipeline that loads
    reason: str
    blocks: int = 1  # of a cluster, each of which has `units` / `blocks` units

    def __str__(self) -> str:
        return self.described(gates=4)

    def described(self, gates: int) -> str:
        """Describe the plan in a line, for units of so many gates."""
        tile = f"{self.regime}: {gates * self.units} x {self.batch} tiles, {self.warps} warps"
        where = "weights on chip"
        if self.regime == "steps":
            where = f"weights in chunks of {self.chunk}"
        if self.regime == "registers":
            where = "weights in registers"
        if self.blocks > 1:
            where = f"weights in registers of {self.blocks} blocks"
        return f"{tile}, {where}"


def compiler_options(regime: str, warps: int, stages: int = 1, blocks: int = 1) -> dict[str, Any]:
    """Return the options by which Triton compiles the kernels of a plan."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if regime == "registers":  # else the assembler saves registers, for more programs, by waiting
        options["maxnreg"] = _MOST_REGISTERS
    if blocks > 1:
        options["num_ctas"] = blocks
    return options


def padded(size: int) -> int:
    """Return the tile that holds `size`: a power of two that a matrix instruction can take."""
    return max(_SMALLEST_DOT, 1 << (size - 1).bit_length())
