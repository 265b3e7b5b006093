"""Cells of papers, written down as their equations stand there: a step of one direction.

Nothing here is shared with fastlstm, and nothing is fast.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

Noise = tuple[Tensor, int, int]  # factors of h [B, P], the seed of zoneout, the direction


def step(
    w: dict[str, Tensor],
    zoneout: tuple[float, float],
    noise: Noise | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    t: int,
) -> list[Tensor]:
    """(x [B, I], h [B, P], c [B, H]) -> the next h and c; `w` has the names of nn.LSTM."""
    H = c.shape[1]
    from_x = x @ w["weight_ih"].T
    from_h = (h if noise is None else h * noise[0]) @ w["weight_hh"].T
    if "weight_ln_ih" in w:
        from_x = layer_norm(from_x, (4 * H,), w["weight_ln_ih"])
        from_h = layer_norm(from_h, (4 * H,), w["weight_ln_hh"])
    gates = from_x + from_h
    if "bias_ih" in w:
        gates = gates + w["bias_ih"] + w["bias_hh"]
    i, f, g, o = (gates[:, k * H : (k + 1) * H] for k in range(4))
    if "weight_ch" in w:
        i = i + w["weight_ch"][:H] * c
        f = f + w["weight_ch"][H : 2 * H] * c
    new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    if "weight_ch" in w:
        o = o + w["weight_ch"][2 * H :] * new_c
    shown = new_c
    if "weight_ln_c" in w:
        shown = layer_norm(new_c, (H,), w["weight_ln_c"], w["bias_ln_c"])
    new_h = torch.sigmoid(o) * torch.tanh(shown)
    if "weight_hr" in w:
        new_h = new_h @ w["weight_hr"].T
    return [
        zoned(zoneout[1], noise, h, new_h, t, 0),
        zoned(zoneout[0], noise, c, new_c, t, 1),
    ]


def zoned(p: float, noise: Noise | None, old: Tensor, new: Tensor, t: int, which: int) -> Tensor:
    """Some elements of old, the others of new; without noise both in proportion."""
    if noise is None:
        return p * old + (1 - p) * new
    numbers = torch.tensor(list(uniform(noise[1], noise[2], t, *old.shape, which)))
    return torch.where(numbers.view(old.shape).to(old.device) < int(p * 2**32), old, new)


def uniform(
    seed: int, direction: int, t: int, batch: int, units: int, which: int
) -> Iterator[int]:
    """The 32-bit numbers that decide which elements of [batch, units] stay."""
    base = mix(mix(seed % 2**32 + direction) + seed // 2**32)
    for b in range(batch):
        row = mix(mix((base ^ 0x9E3779B9) + t) + b)
        for u in range(units):
            yield mix(row ^ mix(base + 2 * u + which))


def mix(x: int) -> int:
    """A bijection of 32-bit numbers that hides where they come from."""
    x %= 2**32
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0x735A2D97 % 2**32
    return x ^ x >> 15
