"""What has been found out about this machine: which kernels are right on it, and which fast.

``fastlstm.verify`` writes verdicts, ``fastlstm.tune`` writes times, and ``auto`` obeys both. There
is one file for each device in the user's cache folder, ``$FASTLSTM_CACHE`` or
``$XDG_CACHE_HOME/fastlstm`` or ``~/.cache/fastlstm``. It holds for exactly the device, driver and
versions that it names; a file of any other kind counts for nothing. A folder that cannot be
written keeps what was found for this process only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import tempfile
import threading
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlstm.spec import LayerSpec

__all__ = [
    "OK",
    "Record",
    "folder",
    "forget",
    "known",
    "load",
    "machine",
    "module_class",
    "shape_class",
    "store",
    "verdict_key",
]

OK = "ok"
_FORMAT = 1
_CPU = "cpu", 0
_SHAPE = re.compile(r"(.*) T<=(\d+) B<=(\d+) .* (training|inference) ")  # see shape_class
_known: dict[tuple[str, int], Record | None] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Record:
    """What is known of one device; who knows more makes another one."""

    machine: dict[str, str]
    verdicts: dict[str, str] = field(default_factory=dict)
    """"BACKEND DTYPE REGIME FEATURE" to "ok", or to what was wrong."""
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    """A :func:`shape_class` to microseconds by backend, first the one that auto takes."""

    def verdict(self, backend: str, dtype: torch.dtype, regime: str, feature: str) -> str | None:
        """Return "ok", what was wrong, or None where nobody has looked."""
        return self.verdicts.get(verdict_key(backend, dtype, regime, feature))

    def about(self, backend: str, dtype: torch.dtype) -> list[str]:
        """Return all verdicts on a backend in a dtype."""
        start = f"{backend} {str(dtype).removeprefix('torch.')} "
        return [verdict for key, verdict in self.verdicts.items() if key.startswith(start)]

    def winner(self, shape: str) -> str | None:
        """Return what auto takes for a class of shapes; None where nobody has measured."""
        return next(iter(self.times.get(shape, ())), None)

    @cached_property
    def _modules(self) -> dict[str, list[tuple[str, bool, int]]]:
        """By :func:`module_class`: what auto takes, whether in training, from how many rows on."""
        found: dict[str, list[tuple[str, bool, int]]] = {}
        for shape, times in self.times.items():
            match = _SHAPE.match(shape)
            if match and times:
                module, steps, batch, use = match.groups()
                rows = (int(steps) // 2 + 1) * (int(batch) // 2 + 1)
                found.setdefault(module, []).append((next(iter(times)), use == "training", rows))
        return found

    @cached_property
    def doubted(self) -> frozenset[str]:
        """The backends that were wrong somewhere."""
        wrong = (key for key, verdict in self.verdicts.items() if verdict != OK)
        return frozenset(key.partition(" ")[0] for key in wrong)

    def always_takes(self, backend: str) -> bool:
        """Whether a backend that is proven has been right and taken wherever one looked."""
        taken = (self.winner(shape) for shape in self.times)
        return backend not in self.doubted and all(name in (None, backend) for name in taken)

    def rows_for_others(self, backend: str, module: str, training: bool = True) -> float:
        """Return from how many rows, T times B, on auto may take another backend.

        Args:
            backend: what auto takes where nothing is known.
            module: a :func:`module_class`.
            training: whether calls may be in training.
        """
        if backend in self.doubted:
            return 0
        each = self._modules.get(module, ())
        found = [rows for name, trained, rows in each if name != backend and trained <= training]
        return min(found, default=math.inf)

    def __str__(self) -> str:
        lines = [f"{name:<10}{value}" for name, value in self.machine.items() if value]
        wrong = {key: verdict for key, verdict in self.verdicts.items() if verdict != OK}
        right = len(self.verdicts) - len(wrong)
        lines.append(f"verified  {right} right, {len(wrong)} wrong")
        lines += [f"  {key}: {verdict}" for key, verdict in wrong.items()]
        lines.append(f"tuned     {len(self.times)} shapes")
        for shape, times in self.times.items():
            told = ", ".join(f"{name} {value:.4g} µs" for name, value in times.items())
            lines.append(f"  {shape}: {told}")
        return "\n".join(lines)


def verdict_key(backend: str, dtype: torch.dtype, regime: str, feature: str) -> str:
    """Return the name under which a verdict stands."""
    return f"{backend} {str(dtype).removeprefix('torch.')} {regime} {feature}"


@lru_cache(maxsize=4096)  # looked up in calls
def module_class(spec: LayerSpec, layers: int) -> str:
    """Return the class of shapes that layers of one kind and size have, whatever T and B are.

    Args:
        spec: the first layer.
        layers: L; 0 for a cell.
    """
    kind = spec.mode if layers else f"{spec.mode}CELL"
    sizes = f"I={spec.input_size} H={spec.hidden_size} P={spec.proj_size}"
    return f"{kind} {sizes} L={layers} D={spec.directions}"


@lru_cache(maxsize=4096)
def shape_class(
    spec: LayerSpec,
    layers: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    packed: bool,
    training: bool,
    threads: int,
    captured: bool = False,
) -> str:
    """Return the class of shapes that one measurement stands for.

    T and B count by powers of two, rounded up; everything else as it is.

    Args:
        spec: the first layer.
        layers: L; 0 for a cell.
        size: T and B.
        dtype: of the input.
        packed: whether rows are packed.
        training: whether a backward pass follows.
        threads: of a CPU; 0 elsewhere.
        captured: whether the call is captured in a CUDA graph.
    """
    steps, batch = (1 << max(n - 1, 0).bit_length() for n in size)
    how = f"{'packed' if packed else 'dense'} {'training' if training else 'inference'}"
    rest = f"bias={int(spec.bias)} threads={threads}{' captured' * captured}"
    name = str(dtype).removeprefix("torch.")
    return f"{module_class(spec, layers)} T<={steps} B<={batch} {name} {how} {rest}"


def folder() -> Path:
    """Return where records are kept."""
    if own := os.environ.get("FASTLSTM_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.join(os.path.expanduser("~"), ".cache")
    # XDG: a relative path counts for nothing. Who has no home has the folder of temporary files.
    absolute = [place for place in (shared, home) if os.path.isabs(place)]
    return Path(*absolute[:1] or [tempfile.gettempdir()]) / "fastlstm"


@cache
def machine(device: torch.device) -> dict[str, str]:
    """Describe a device, its driver, and the versions of what computes on it."""
    name, driver = device.type, ""
    if device.type == "cpu":
        name = _cpu()
    elif device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        c: Any = torch._C
        driver = f"{c._cuda_getDriverVersion()}" if torch.version.hip is None else "ROCm"
        driver += f", cuDNN {torch.backends.cudnn.version()}"
    else:
        named = getattr(getattr(torch, device.type, None), "get_device_name", None)
        name, driver = named(device) if named else device.type, platform.platform()
    return {
        "device": name,
        "driver": driver,
        "PyTorch": torch.__version__,
        "Triton": _version("triton"),
        "fastlstm": _version("fastlstm"),
    }


def _cpu() -> str:
    """Name the processor, and how many cores there are."""
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.partition(":")[2].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _path(device: torch.device) -> Path:
    text = json.dumps(machine(device), sort_keys=True)
    return folder() / f"{device.type}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def known(x: Tensor) -> Record | None:
    """Return what is known of the device of x, None if nothing; the file is read once."""
    # Asking for the device takes longer, at every call.
    key = _CPU if x.is_cpu else (x.device.type, x.device.index or 0)
    try:
        return _known[key]
    except KeyError:
        with _lock:
            _known[key] = found = load(x.device)
        return found


def load(device: torch.device) -> Record | None:
    """Read the record of a device; None where there is none, or none that counts."""
    try:
        if not any(folder().glob(f"{device.type}-*.json")):  # most people have none
            return None
        found = json.loads(_path(device).read_text())
        if found["format"] != _FORMAT or found["machine"] != machine(device):
            return None
        verdicts = {str(key): str(value) for key, value in found["verdicts"].items()}
        times = {
            str(shape): {str(name): float(value) for name, value in each.items()}
            for shape, each in found["times"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return Record(dict(machine(device)), verdicts, times)


def store(device: torch.device, record: Record) -> str | None:
    """Keep a record for this process and, in the cache folder, for those to come.

    Returns:
        Why it could not be written; None if it was. A reader sees the old file or the new one,
        never half of one.
    """
    with _lock:
        _known[device.type, device.index or 0] = record
    content = {
        "format": _FORMAT,
        "machine": record.machine,
        "verdicts": record.verdicts,
        "times": record.times,
    }
    path = _path(device)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            temporary = file.name
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return f"{path} cannot be written: {error.strerror}"
    return None


def forget(device: torch.device) -> bool:
    """Delete the record of a device; return whether there was one on disk."""
    with _lock:
        _known[device.type, device.index or 0] = None
    try:
        _path(device).unlink()
    except OSError:
        return False
    return True
