"""Memory: what a forward pass keeps for the backward pass, and what a call takes at its peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def kept_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes of all storages that autograd keeps, without those of the tensors `own`."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # held, so that no address is used twice
    for tensor in own:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def rest_bytes(module: nn.Module) -> int:
    """Bytes that a module holds between calls: weights, and the packed copies that ours keeps."""
    tensors = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        for cache in (*getattr(part, "_caches", ()), getattr(part, "_cache", {})):
            tensors += cache.values()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak(call: Callable[[], object]) -> int | None:
    """Bytes that a call adds to the resident memory of this process, at most; None if unknown.

    Linux tells the highest mark since it was set back. Pages are what it counts, so kilobytes are
    noise, and what an allocator had kept from earlier calls is given back first.
    """
    own = Path("/proc/self")
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (own / "clear_refs").write_text("5")
        before = _status(own, "VmRSS")
        call()
        return max(0, _status(own, "VmHWM") - before)
    except (OSError, AttributeError):  # another system, or no leave to write there
        return None


def gpu_peak(call: Callable[[], object]) -> int:
    """Bytes that a call adds to what PyTorch has allocated on the current GPU, at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status(process: Path, name: str) -> int:
    for line in (process / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in the status of a process")
