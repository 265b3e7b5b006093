"""Plans of the registers regime: one program holds all units, its weights rest in registers.

What the kernels compile to decides (``python -m benchmarks kernels``). A program has 8 sequences,
the fewest columns of a matrix instruction. Of 16 each step would cost twice as much, since most of
it is activations, and from H = 32 on registers would spill; two programs of 8 on a multiprocessor
do the same work, and one goes on while the other waits at its barrier. Few sequences, which leave
multiprocessors empty, take two columns each: programs of 4 have half of the activations.

Exact float32 is multiplied a number at a time, which is most of a step then. A thread has one
cell, so that programs of 4 sequences have twice as many warps as those of 2, which are for few
(``exact_tiles.py``).
"""

from __future__ import annotations

from .plan import Device, Plan, Problem, padded
from .sequence_plans import widest

__all__ = [
    "SEQUENCES",
    *("backward_cluster", "backward_registers", "forward_cluster", "forward_registers"),
    *("fits_registers", "sequences"),
]

SEQUENCES = 8  # of a program over a cluster
# Of others, by how float32 is multiplied: few, as long as no two warps share a quarter of a
# multiprocessor, and many.
_SEQUENCES = {"tf32": (4, 8), "ieee": (2, 4)}
_QUARTERS = 4
_WIDEST_FLOAT32 = 64  # some registers spill; in shared memory a step takes five times as long
_WIDEST_INPUT = 64  # that goes through its weights in the loop
_WIDEST_INPUT_OF_WIDE = 32  # of 128 units
_WIDEST_INPUT_OF_FLOAT32 = 16
# From and to, by bytes of a number: what registers of 4 to 16 blocks hold.
_UNITS_OF_A_CLUSTER = {2: (256, 512), 4: (128, 256)}
_UNITS_OF_A_BLOCK = 32
_MOST_WAVES = 6  # of clusters, one after the other: still better than a launch for each step
_ON_CHIP = "W_hh fits the registers of one multiprocessor"
_IN_CLUSTER = "W_hh fits the registers of a cluster"


def sequences(precision: str) -> tuple[int, int]:
    """Return how many sequences a program has: where there are few of them, and otherwise."""
    return _SEQUENCES[precision]


def fits_registers(problem: Problem, device: Device) -> bool:
    """Return whether one program can hold all weights of the recurrence in registers."""
    spec = problem.spec
    plain = problem.cell == "plain" and not spec.proj_size
    known = device.gluon and device.arch >= 80  # the oldest whose mma.sync takes them all
    most = _WIDEST_FLOAT32 if problem.element == 4 else widest(problem)
    return known and plain and padded(spec.hidden_size) <= most


def forward_registers(problem: Problem, device: Device) -> Plan | None:
    """Return the plan of the forward pass of an LSTM; None where a layer has no room."""
    if not fits_registers(problem, device):
        return None
    most = _WIDEST_INPUT
    if problem.precision == "ieee":
        most = 0
    elif problem.element == 4:
        most = _WIDEST_INPUT_OF_FLOAT32
    elif padded(problem.spec.hidden_size) == widest(problem):
        most = _WIDEST_INPUT_OF_WIDE
    fused = padded(problem.spec.input_size) <= most
    where = "so do its input weights" if fused else "its input products are made before"
    return _plan(problem, device, fused, f"{_ON_CHIP}, {where}")


def backward_registers(problem: Problem, device: Device) -> Plan | None:
    """Return the plan of the backward pass of an LSTM; None where a layer has no room."""
    return _plan(problem, device, False, _ON_CHIP) if fits_registers(problem, device) else None


def forward_cluster(problem: Problem, device: Device) -> Plan | None:
    """Return the plan of the forward pass over a cluster; None where a layer has no room.

    A block has 32 units, whose weights its 8 warps can hold: fewer would send more than they
    compute. 16 blocks are more than every GPU of the kind must have: the driver says.
    """
    return _cluster(problem, device, f"{_IN_CLUSTER}, its input products are made before")


def backward_cluster(problem: Problem, device: Device) -> Plan | None:
    """Return the plan of the backward pass over a cluster: there is one wherever forward has one.

    It reads the gates as that keeps them.
    """
    return _cluster(problem, device, _IN_CLUSTER)


def _cluster(problem: Problem, device: Device, reason: str) -> Plan | None:
    spec, units = problem.spec, padded(problem.spec.hidden_size)
    plain = problem.cell == "plain" and not spec.proj_size
    known = device.clusters and device.arch == 90
    known &= problem.precision != "ieee"  # which has no matrix instructions
    least, most = _UNITS_OF_A_CLUSTER.get(problem.element, (1, 0))
    if not (known and plain and least <= units <= most):
        return None
    blocks = units // _UNITS_OF_A_BLOCK
    clusters = _programs(problem, SEQUENCES)
    plan = Plan("cluster", units, SEQUENCES, units, False, 8, 1, reason, blocks)
    return plan if clusters <= _MOST_WAVES * device.at_once(blocks) else None


def _plan(problem: Problem, device: Device, fused: bool, reason: str) -> Plan:
    """Return the plan of a pass: a warp for each 16 units, or a thread for each exact cell."""
    units, exact = padded(problem.spec.hidden_size), problem.precision == "ieee"
    warps = units // 16
    least, most = sequences(problem.precision)
    few = _programs(problem, least) <= device.processors * max(1, _QUARTERS // warps)
    batch = least if few and (problem.dense or exact) else most
    if exact:
        warps = units * batch // 32
    return Plan("registers", units, batch, units, fused, warps, 1, reason)


def _programs(problem: Problem, batch: int) -> int:
    """Return how many programs of so many sequences there are."""
    return -(-problem.B // batch) * problem.spec.directions
