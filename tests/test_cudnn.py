"""Every backend of this machine against what cuDNN computed on a GPU, from recorded files.

`python -m benchmarks gpu` records them in tests/data. Numbers that others published are in
tests/test_published.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Results, evaluate, fast, plain
from oracle import compare, measure
from recorder import CASES, Record, from_numpy, load, record, to_numpy

from benchmarks.speed.precision import PRECISIONS, Precision

DATA = Path(__file__).parent / "data"
RECORDS = [found for path in sorted(DATA.glob("cudnn-*.npz")) for found in load(path)]


def check(record: Record) -> None:
    """Ours is as close to float64 as the oracle allows with cuDNN as its yardstick, and so to it.

    The truth is computed here. The recorded results are held against it as well: a file that
    belongs to other numbers does not pass.
    """
    case, dtype = record.case, record.precision.dtype
    truth = evaluate(case, torch.float64, record.numbers, plain)
    compare(f"recorded, {record}", record.results, truth, record.allowed)
    ours = evaluate(case, dtype, record.numbers, fast)
    compare(f"fastlstm, {record}", ours, truth, record.allowed)
    own = measure(record.results, truth)
    apart = {name: record.allowed[name] + own[name] for name in own}
    compare(f"fastlstm and recorded, {record}", ours, record.results, apart)


if RECORDS:

    @pytest.mark.parametrize("found", RECORDS, ids=str)
    def test_agrees_with_cudnn(backend: str, found: Record) -> None:
        check(found)

    def test_every_precision_was_recorded_on_a_gpu() -> None:
        assert {found.precision.name for found in RECORDS} == set(PRECISIONS)
        for found in RECORDS:
            assert found.facts["gpu"] and found.facts["cudnn"] and found.facts["torch"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What the recorder writes with the CPU's nn.LSTM in the place of cuDNN's."""
    return record(tmp_path_factory.mktemp("recorded"), "cpu")


def test_round_trip(files: list[Path], backend: str) -> None:
    """Recorder, files and check, on a machine without a GPU."""
    assert [path.name for path in files] == [f"cudnn-{name}.npz" for name in PRECISIONS]
    assert sum(path.stat().st_size for path in files) < 2**20
    for path in files:
        records = list(load(path))
        assert [found.case for found in records] == list(CASES)
        for found in records:
            check(found)


def spoil(values: Results, name: str) -> Results:
    spoiled = {key: value.detach().clone() for key, value in values.items()}
    spoiled[name].view(-1)[0] += 0.1
    return spoiled


@pytest.mark.parametrize("name", ["y", "d weight_hh_l0", "d x"])
def test_a_wrong_record_is_refused(files: list[Path], name: str) -> None:
    found = next(load(files[-1]))
    check(found)
    with pytest.raises(AssertionError, match="recorded"):
        check(replace(found, results=spoil(found.results, name)))


def test_other_numbers_are_refused(files: list[Path]) -> None:
    found = next(load(files[-1]))
    with pytest.raises(AssertionError, match="recorded"):
        check(replace(found, numbers=spoil(found.numbers, "x")))


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=str)
def test_arrays_keep_every_bit(precision: Precision) -> None:
    limits = torch.finfo(precision.dtype)
    values = torch.tensor([limits.max, limits.tiny, -limits.eps, 0.0], dtype=precision.dtype)
    array = to_numpy(values)
    assert array.dtype.itemsize == precision.dtype.itemsize
    assert torch.equal(from_numpy(array, precision.dtype), values)
