"""Kernels are compiled once for a layer, whatever its T and B: through Triton's own launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.compiles
def test_one_kernel_for_every_length_and_batch() -> None:
    """Nothing in a signature depends on T, B or the rows, 1 and multiples of 16 among them."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.specialize"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    names = {"steps": "step"}
    weights = [("lstm_input_products_kernel", "inputs")]
    weights += [(f"lstm_weight_{name}_kernel", "weights") for name in ("parts", "sums")]
    kernels = [
        (f"{kind}_{way}_{names.get(regime, regime)}_kernel", regime)
        for kind, regimes in (
            ("lstm", ("registers", "sequence", "sequence", "steps", "steps")),
            ("rnn", ("sequence", "steps")),
        )
        for regime in regimes
        for way in ("fwd", "bwd")
    ]
    assert [(name, regime) for name, regime, _ in lines] == kernels[:-4] + weights + kernels[-4:]
    assert {count for *_, count in lines} == {"1"}, run.stdout
