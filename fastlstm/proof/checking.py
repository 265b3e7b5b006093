"""``FASTLSTM_CHECK=1``: every call is computed twice and compared, to find what is wrong silently.

It takes many times as long; it is for bug reports. Calls in which something is drawn at random,
and those that somebody compiles, records or transforms, are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.automatic import first_obstacle
from fastlstm.kernels.base import Backend
from fastlstm.kernels.pytorch import TORCH
from fastlstm.kernels.reference import REFERENCE
from fastlstm.layer import stack
from fastlstm.proof.oracle import Results, distance, judge
from fastlstm.spec import LayerSpec, Sequences

__all__ = ["examine"]

Compute = Callable[[Backend, Tensor, Any, Sequence[Tensor]], tuple[Tensor, Any, Any]]


def examine(
    backend: Backend,
    compute: Compute,
    tensors: tuple[Tensor, Any, Sequence[Tensor]],
    specs: Sequence[LayerSpec],
    sequences: Sequences,
    cell_states: bool,
) -> None:
    """Compare a call with PyTorch's own kernels, or the reference, and with float64.

    Args:
        backend: what ``auto``, or the user, has chosen.
        compute: computes the call on a backend from other tensors.
        tensors: x, hx and the weights.
        specs: the layers.
        sequences: which steps there are.
        cell_states: whether c of every step is asked for.

    Raises:
        RuntimeError: results or gradients part by more than rounding explains.
    """
    x = tensors[0]
    if not x.is_floating_point() or not x.numel() or not (x.is_cpu or x.is_cuda):
        return
    lacks = first_obstacle(TORCH, x, specs, sequences, cell_states)
    other = REFERENCE if backend is TORCH or lacks is not None else TORCH
    if other is backend:
        return
    call = _Call(compute, tensors)
    dtype = x.dtype
    # The reference rounds 16-bit results once, kernels may round h at every step.
    spacing = torch.finfo(dtype).eps if other is REFERENCE else None
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        truth, allowed = judge(
            lambda d, numbers: call.run(REFERENCE if d is torch.float64 else other, d, numbers),
            dtype,
            call.numbers,
            arithmetic=spacing,
        )
    found, peer = (call.run(each, dtype, call.numbers) for each in (backend, other))
    for name, want in truth.items():
        error = distance(found[name], want)
        if not error.numel() or float(error.max()) <= allowed[name]:
            continue
        at = int(error.argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(at), want.shape)]
        ours, theirs, right = (float(t.flatten()[at]) for t in (found[name], peer[name], want))
        raise RuntimeError(
            f"FASTLSTM_CHECK: {name}{place} is {ours:.9g} by {backend.name}, {theirs:.9g} by "
            f"{other.name} and {right:.9g} in float64; {allowed[name]:.3g} is allowed. Please "
            f"report it, with this: {specs[0]}, {len(specs)} layers, input {list(x.shape)} "
            f"{dtype} on {x.device}"
        )


class _Call:
    """A call that can be made again, of other numbers."""

    def __init__(self, compute: Compute, tensors: tuple[Tensor, Any, Sequence[Tensor]]) -> None:
        self._compute = compute
        x, hx, weights = tensors
        self._states = len(hx or ())
        named = {"x": x} | dict(zip(("h_0", "c_0"), hx or (), strict=False))
        named |= {f"weight {k}": w for k, w in enumerate(weights)}
        self.numbers = {name: t.detach().double() for name, t in named.items()}
        grad = torch.is_grad_enabled()
        self._wanted = {name for name, t in named.items() if grad and t.requires_grad}

    def run(self, backend: Backend, dtype: torch.dtype, numbers: Results) -> Results:
        """The results and gradients of these numbers, by a backend, in a dtype."""
        leaves = {
            name: t.to(dtype).requires_grad_(name in self._wanted) for name, t in numbers.items()
        }
        x, *rest = leaves.values()
        hx = tuple(rest[: self._states]) or None
        with torch.set_grad_enabled(bool(self._wanted)):
            y, final, c_all = self._compute(backend, x, hx, rest[self._states :])
        results = {"y": y} | dict(zip(("h_n", "c_n"), final, strict=False))
        results |= {} if c_all is None else {"c_all": c_all}
        found = {name: t.detach().double() for name, t in results.items()}
        if self._wanted:
            wanted = [leaves[name] for name in sorted(self._wanted)]
            generator = torch.Generator().manual_seed(0)
            arriving = [torch.randn(t.shape, generator=generator).to(t) for t in results.values()]
            gradients = torch.autograd.grad(
                list(results.values()), wanted, arriving, allow_unused=True, materialize_grads=True
            )
            pairs = zip(sorted(self._wanted), gradients, strict=True)
            found |= {f"gradient of {name}": g.double() for name, g in pairs}
        return found


stack.examine = examine
