"""A process that runs out of memory: python memory_limit.py BACKEND SIZE LAST STEP

An LSTM(SIZE, SIZE) goes forward and backward with 0, STEP, ... LAST MB more than the process has.
Each limit has a child of its own, which may die. The last line printed is JSON: how each ended.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch

import fastlstm

MB = 1 << 20


def address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def limit(more: int | None) -> None:
    """Allow the process so many bytes more than it has; None: no limit."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(
        resource.RLIMIT_AS, (hard if more is None else address_space() + more, hard)
    )


def results(lstm: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    lstm.zero_grad()
    y = lstm(x)[0]
    y.sum().backward()
    return [y.detach(), *(p.grad for p in lstm.parameters())]


def ends(model: torch.nn.Module, x: torch.Tensor, want: list[torch.Tensor], more: int) -> str:
    """What a call comes to that has `more` bytes, and whether the module is as it was after it."""
    lstm = fastlstm.LSTM(x.shape[-1], x.shape[-1])  # one that has packed nothing yet
    lstm.load_state_dict(model.state_dict())
    torch.set_num_threads(2)
    results(fastlstm.LSTM(8, 8), torch.randn(2, 4, 8))  # starts the threads before the limit
    outcome, sizes = "", []
    limit(more)
    for _ in range(4):
        try:
            results(lstm, x)
            outcome = "result"
            break
        except (RuntimeError, MemoryError) as error:
            outcome = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        lstm.zero_grad()
        sizes.append(address_space())
    limit(None)
    if len(sizes) > 2 and sizes[-1] > sizes[1] + 4 * MB:  # less than a matrix of such a layer
        return f"leak: {sizes}"
    if not all(map(torch.equal, results(lstm, x), want)):
        return "wrong"
    return outcome


def main(backend: str, size: int, last: int, step: int) -> None:
    torch.set_num_threads(1)  # starts no thread: children may start theirs
    lstm, x = fastlstm.LSTM(size, size), torch.randn(4, 4, size)
    ended = {}
    with fastlstm.backend(backend):
        want = results(lstm, x)
        lstm.zero_grad()
        for more in range(0, last + 1, step):
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writer, ends(lstm, x, want, more * MB).encode())
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as pipe:
                text = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended[more] = text or f"died: {status}"
    print(json.dumps(ended))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
