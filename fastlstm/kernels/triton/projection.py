"""The product with w_hr, which lies between the launches of the steps regime.

Where one program holds all units, the kernel computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlstm.kernels.products import product, product_into
from fastlstm.spec import Incoming

from .buffers import StepGradients
from .call import Call

__all__ = ["Projection", "ProjectionGradient"]


class Projection:
    """Forward: from what a step leaves to its h.

    Args:
        call: the layer.
        hidden: [rows, D*H], what w_hr is applied to.
        y: [rows, D*P], h of every step, written.
        masked: [rows, D*P], h as it goes into w_hh, written where it has a mask.
    """

    def __init__(self, call: Call, hidden: Tensor, y: Tensor, masked: Tensor) -> None:
        self._call, self._hidden, self._y, self._masked = call, hidden, y, masked
        self._steps = call.rows.steps()

    def step(self, begin: int) -> None:
        """Compute what the launch of step `begin` leaves open, in every direction."""
        H, P = self._call.spec.hidden_size, self._call.spec.proj_size
        h_mask = self._call.noise.h_mask
        for d, weights in enumerate(self._call.weights):
            assert weights.w_hr is not None
            at = self._steps[begin if d == 0 else self._call.rows.T - 1 - begin]
            columns = slice(d * P, (d + 1) * P)
            h = self._y[at, columns]
            product_into(h, self._hidden[at, d * H : (d + 1) * H], weights.w_hr.T)
            if h_mask is not None:
                self._masked[at, columns] = h * h_mask[d, : len(h)]


class ProjectionGradient:
    """Backward: from the gradient of h to that of what w_hr was applied to.

    The gradient of h is that of y, and what comes through w_hh from the gates of the step after.

    Args:
        call: the layer.
        incoming: dy and dh_n are read.
        steps: dgates is read, dprojected written.
    """

    def __init__(self, call: Call, incoming: Incoming, steps: StepGradients) -> None:
        assert steps.dprojected is not None
        self._call, self._dgates, self._dprojected = call, steps.dgates, steps.dprojected
        rows, spec, dy, dh_n = call.rows, call.spec, incoming.dy, incoming.dh_n
        D, H, P = spec.directions, spec.hidden_size, spec.proj_size
        total = torch.zeros(rows.count, D * P, dtype=torch.float32, device=call.x.device)
        if dy is not None:
            dy = dy.reshape(rows.count, D * P)
            # Whatever comes in for padding must not meet the zeros of what w_hr is applied to.
            total += torch.where(rows.real(), dy, 0) if rows.padded else dy
        self._total = [total[:, d * P : (d + 1) * P] for d in range(D)]
        if dh_n is not None:
            for d, part in enumerate(self._total):
                last = rows.first(1 - d)
                end = torch.where(rows.empty(), 0, dh_n[d]) if rows.padded else dh_n[d]
                part.index_copy_(0, last, part.index_select(0, last) + end)
        flat = torch.zeros(rows.count, D * H, dtype=torch.float32, device=call.x.device)
        self._parts = [flat[:, d * H : (d + 1) * H] for d in range(D)]
        self._steps = rows.steps()
        packed = rows.sizes is not None
        self.d_hidden = flat if packed else flat.view(rows.T, rows.B, D * H)
        """float32 [T, B, D*H] or [N, D*H]: the result, up to the step that was taken last."""

    def step(self, begin: int) -> None:
        """Compute what the launch of step `begin` needs, in every direction."""
        T = self._call.rows.T
        for d, weights in enumerate(self._call.weights):
            assert weights.w_hr is not None
            t = T - 1 - begin if d == 0 else begin
            if begin > 0:
                self._add_through_w_hh(d, t, t + 1 if d == 0 else t - 1)
            at, total = self._steps[t], self._total[d]
            P = total.shape[1]
            dprojected = self._dprojected[at, d * P : (d + 1) * P]
            dprojected.copy_(total[at])
            self._parts[d][at] = product(dprojected, weights.w_hr)

    def _add_through_w_hh(self, d: int, t: int, after: int) -> None:
        """Add to the gradient of h of step t what the gates of the step `after` it pass on."""
        at, after_at = self._steps[t], self._steps[after]
        # Rows of sequences that end here are not in the step after, or padding of zeros.
        count = min(at.stop - at.start, after_at.stop - after_at.start)
        dgates = self._dgates[d][after_at.start : after_at.start + count]
        through = product(dgates, self._call.weights[d].w_hh)
        if self._call.noise.h_mask is not None:
            through *= self._call.noise.h_mask[d, :count]
        if self._call.rows.reset is not None:
            through.masked_fill_(self._call.rows.reset[after].bool()[:, None], 0)
        self._total[d][at.start : at.start + count] += through
