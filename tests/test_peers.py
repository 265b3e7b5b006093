"""The peers of the benchmarks: each computes what nn.LSTM does, or says why it has no part in it.

One that is not installed is skipped. Those with a runtime of their own get a process of their own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.providers import Provider, provider
from benchmarks.providers.remote import Remote
from benchmarks.speed.cases import Case
from benchmarks.speed.check import Judge
from benchmarks.speed.contender import Contender
from benchmarks.speed.workload import Workload, make_workload

PEERS = ("jax", "flax", "keras-torch", "keras-jax", "torchrl", "flashrnn", "haste")
TINY = Case("tiny", 3, 5, 2, 1, 3, 4)
CASES = {
    "plain": (TINY, "infer", "train"),
    "bidirectional": (replace(TINY, D=2), "infer"),
    "packed": (replace(TINY, D=2, packed=True), "infer", "train"),
    "reset": (replace(TINY, T=9, B=16, reset=True), "infer", "train"),
    "step": (replace(TINY, T=1), "step"),
    "step-reset": (replace(TINY, T=1, B=64, reset=True), "step"),
}
EVERY_REFUSAL = """
import sys, torch
from benchmarks.providers import provider
from benchmarks.speed.workload import make_workload
from tests.test_peers import CASES, PEERS
for case, *modes in CASES.values():
    for device in ("cpu", "meta"):
        for mode in modes:
            work = make_workload(case, mode, torch.float32, device)
            for name in PEERS:
                provider(name).refuses(work)
heavy = {"jax", "flax", "keras", "torchrl", "tensordict", "flashrnn", "haste_pytorch"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


@pytest.fixture(scope="module", params=PEERS)
def peer(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Provider, Callable[[Workload], Contender]]]:
    """A provider and what makes its contenders; one process serves all tests of a remote one."""
    found = provider(request.param)
    missing = found.missing()
    if missing:
        pytest.skip(missing)
    with pytest.MonkeyPatch.context() as patch:
        if found.name == "flashrnn":  # its layouts, in plain PyTorch
            patch.setattr(found, "backend", "vanilla")
        if not found.remote:
            yield found, found.contender
            return
        with Remote(found.name) as process:
            yield found, process.contender


@pytest.mark.parametrize("kind", CASES)
def test_results(peer: tuple[Provider, Callable[[Workload], Contender]], kind: str) -> None:
    who, contender = peer
    case, *modes = CASES[kind]
    for mode in modes:
        work = make_workload(case, mode, torch.float32, input_gradient=True)
        refusal = who.refuses(work)
        if refusal:
            pytest.skip(refusal)
        judge = Judge(work)
        with torch.inference_mode(mode != "train"):
            made = contender(work)
            assert made.results().keys() == judge.truth.keys()
            judge.error(who.name, made, ours=False)
            assert made.seconds(2) > 0
            judge.error(who.name, made, ours=False)  # calls leave the results as they were


@pytest.mark.parametrize(
    "name, kind, device, reason",
    [
        ("jax", "step", "cpu", None),
        ("flax", "reset", "cpu", "no resets"),
        ("keras-jax", "reset", "cpu", "no resets"),
        ("torchrl", "packed", "cpu", "no ragged batches"),
        ("torchrl", "bidirectional", "cpu", None),
        ("torchrl", "bidirectional", "meta", "one direction only"),
        ("flashrnn", "plain", "cpu", "for GPUs"),
        ("flashrnn", "plain", "meta", "H in steps of 16"),
        ("haste", "plain", "cpu", "for GPUs"),
        ("haste", "packed", "meta", "one direction only"),
        ("haste", "plain", "meta", None),
    ],
)
def test_refusals(name: str, kind: str, device: str, reason: str | None) -> None:
    """On the meta device as on a GPU: numbers are not looked at."""
    case, mode, *_ = CASES[kind]
    assert provider(name).refuses(make_workload(case, mode, torch.float32, device)) == reason


def test_to_refuse_nothing_is_imported() -> None:
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", EVERY_REFUSAL], cwd=root, check=True, timeout=100)
