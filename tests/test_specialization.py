"""Kernels are compiled once for a layer, whatever its T and B: through Triton's own launcher."""

import os
import subprocess
import sys
from pathlib import Path


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
    assert [(name, count) for name, _, count in lines] == [
        ("lstm_fwd_sequence_kernel", "1"),
        ("lstm_bwd_sequence_kernel", "1"),
        ("lstm_fwd_step_kernel", "1"),
        ("lstm_bwd_step_kernel", "1"),
        ("lstm_fwd_step_kernel", "1"),
        ("lstm_bwd_step_kernel", "1"),
    ]
