"""A process that runs out of memory: python memory_limit.py BACKEND SIZE LAST STEP [KIND]

An LSTM(SIZE, SIZE), or another of KINDS, goes forward and backward with 0, STEP, ... LAST MB more
than the process has. Of a quantized kind, a layer of torch.nn is quantized and goes forward. Each
limit has a child of its own, which may die. The last line printed is JSON: how each ended.
"""

import json
import os
import resource
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

MB = 1 << 20
KINDS = {
    "LSTM": fastlstm.LSTM,
    "packed": fastlstm.LSTM,
    "bidirectional": partial(fastlstm.LSTM, bidirectional=True),
    "recompute": partial(fastlstm.LSTM, recompute=True),
    "projected": partial(fastlstm.LSTM, proj_size=64, bidirectional=True),
    "batch first": partial(fastlstm.LSTM, batch_first=True, num_layers=2),
    "RNN": fastlstm.RNN,
    "cell": fastlstm.LSTMCell,
    "int8": torch.nn.LSTM,
    "bfloat16": torch.nn.RNN,
}


def address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def limit(size: int | None) -> None:
    """Allow the process to have so many bytes; None: no limit."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if size is None else size, hard))


def results(lstm: torch.nn.Module, x: torch.Tensor, kind: str) -> list[torch.Tensor]:
    lstm.zero_grad()
    if kind in ("int8", "bfloat16"):
        return [fastlstm.quantize(lstm.eval(), kind)(x)[0]]
    if kind == "cell":
        hx = None
        for row in x:
            hx = lstm(row, hx)
        y = hx[0]
    elif kind == "packed":
        y = lstm(pack_padded_sequence(x, [4, 3, 2, 1]))[0].data
    else:
        y = lstm(x)[0]
    y.sum().backward()
    return [y.detach(), *(p.grad for p in lstm.parameters())]


def ends(
    model: torch.nn.Module, x: torch.Tensor, want: list[torch.Tensor], more: int, kind: str
) -> str:
    """What a call comes to that has `more` bytes, and whether the module is as it was after it."""
    lstm = KINDS[kind](x.shape[-1], x.shape[-1])  # one that has packed nothing yet
    lstm.load_state_dict(model.state_dict())
    torch.set_num_threads(2)
    # All threads start before the limit. One of OpenMP that finds no memory ends the process.
    results(fastlstm.LSTM(8, 8), torch.randn(2, 4, 8), "LSTM")
    torch.ones(1 << 20).mul_(2)
    outcome, sizes = "", [address_space()]
    for _ in range(4):
        limit(sizes[-1] + more)
        try:
            results(lstm, x, kind)
            outcome = "result"
        except (RuntimeError, MemoryError) as error:
            limit(None)  # a message needs memory, too
            outcome = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        limit(None)
        if outcome == "result":
            break
        lstm.zero_grad()
        sizes.append(address_space())
    # What is there once, such as a thread's stack, comes in one attempt; what leaks comes in each.
    grown = [after - before for before, after in pairwise(sizes)]
    if len(grown) == 4 and min(grown[1:]) > 2 * MB:  # less than a matrix of such a layer
        return f"leak: {sizes}"
    if not all(map(torch.equal, results(lstm, x, kind), want)):
        return "wrong"
    return outcome


def main(backend: str, size: str, last: str, step: str, kind: str = "LSTM") -> None:
    torch.set_num_threads(1)  # starts no thread: children may start theirs
    lstm, x = KINDS[kind](int(size), int(size)), torch.randn(4, 4, int(size))
    ended = {}
    with fastlstm.backend(backend):
        want = results(lstm, x, kind)
        lstm.zero_grad()
        for more in range(0, int(last) + 1, int(step)):
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writer, ends(lstm, x, want, more * MB, kind).encode())
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as pipe:
                text = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended[more] = text or f"died: {status}"
    print(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
