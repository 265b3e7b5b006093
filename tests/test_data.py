"""The reader of the digits: what it accepts, what it refuses and what it says then."""

import gzip
import hashlib
import io
import struct
from dataclasses import replace
from email.message import Message
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from benchmarks.tasks import data

SIZES = {data.IMAGES: (6, 3, 2), data.LABELS: (6,)}


def idx(magic: int, shape: tuple[int, ...]) -> bytes:
    header = struct.pack(f">{1 + len(shape)}I", magic, *shape)
    return header + bytes(i % 10 for i in range(torch.Size(shape).numel()))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four tiny files, by name and gzipped, that `data` now takes for the official ones."""
    contents, table = {}, []
    for file in data.FILES:
        raw = idx(file.magic, SIZES[file.magic])
        packed = gzip.compress(raw)
        contents[f"{file.name}.gz"] = packed
        table.append(replace(file, sha256_gz=sha256(packed), sha256_raw=sha256(raw)))
    monkeypatch.setattr(data, "FILES", tuple(table))
    return contents


@pytest.fixture
def folder(files: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_reads_gzipped_and_plain_files_alike(folder: Path) -> None:
    digits = data.read_mnist(folder)
    for file in data.FILES:
        packed = folder / f"{file.name}.gz"
        (folder / file.name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    plain = data.read_mnist(folder)
    assert digits.train_images.shape == (6, 3, 2)
    assert digits.train_labels.tolist() == list(range(6))
    assert digits.train_labels.dtype == torch.int64
    assert torch.equal(digits.test_images.flatten(), (torch.arange(36) % 10).float() / 255)
    assert torch.equal(plain.train_images, digits.train_images)
    assert torch.equal(plain.test_labels, digits.test_labels)


def test_a_missing_file_is_named_with_its_checksum(folder: Path) -> None:
    file = data.FILES[2]
    (folder / f"{file.name}.gz").unlink()
    with pytest.raises(data.DataError, match=rf"{file.name}.*missing.*{file.sha256_gz}"):
        data.load(folder)


def test_a_folder_from_the_environment_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLSTM_DATA", str(tmp_path))
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte.*missing"):
        data.load()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_a_damaged_file_is_named_with_both_checksums(folder: Path, damage: str) -> None:
    file = data.FILES[1]
    path = folder / f"{file.name}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"truncated": bytes(content[:-9]), "one bit": bytes(content), "empty": b""}[damage]
    path.write_bytes(damaged)
    with pytest.raises(data.DataError, match=f"{path}.*{file.sha256_gz}.*{sha256(damaged)}"):
        data.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(data.LABELS, (6,)), "magic number 0x803, found 0x801"),
        (idx(data.IMAGES, (6, 3, 2))[:-1], "expected 52 bytes .* found 51"),
        (idx(data.IMAGES, (6, 3, 2)) + b"x", "expected 52 bytes .* found 53"),
        (b"", "magic number 0x803, found 0x0"),
    ],
)
def test_a_wrong_format_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.read_idx(path, data.IMAGES, sha256(content))


def test_a_truncated_gzip_stream_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    content = gzip.compress(idx(data.IMAGES, (6, 3, 2)))[:-9]
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=r"images\.gz is not a whole gzip file"):
        data.read_idx(path, data.IMAGES, sha256(content))


class Mirror:
    """A stand-in for `urlopen`; the first mirror never answers."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[str] = []

    def __call__(self, request: object, timeout: float) -> io.BytesIO:
        url = request.full_url  # type: ignore[attr-defined]
        self.requests.append(url)
        if url.startswith(data.MIRRORS[0]):
            raise URLError("no route")
        content = self.files[url.removeprefix(data.MIRRORS[1])]
        response = io.BytesIO(content)
        response.headers = Message()  # type: ignore[attr-defined]
        response.headers["Content-Length"] = str(len(content))  # type: ignore[attr-defined]
        return response


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FASTLSTM_DATA", raising=False)
    monkeypatch.setenv("FASTLSTM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mnist"


def test_a_download_comes_from_the_second_mirror_and_is_kept(
    files: dict[str, bytes],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror = Mirror(files)
    monkeypatch.setattr(data, "urlopen", mirror)
    digits = data.load()
    assert len(mirror.requests) == 2 * len(files)
    again = data.load()
    assert len(mirror.requests) == 2 * len(files)
    assert torch.equal(again.train_images, digits.train_images)
    assert sorted(path.name for path in cache.iterdir()) == sorted(files)
    assert capsys.readouterr().out.splitlines() == [f"data: {digits.source}, from {cache}"] * 2


def test_a_wrong_download_is_refused_and_not_kept(
    files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "urlopen", Mirror(dict.fromkeys(files, b"<html>log in</html>")))
    with pytest.raises(data.DataError, match=f"train-images.*{data.FILES[0].sha256_gz}"):
        data.load()
    assert not cache.exists()


def test_without_a_network_the_small_digits_stand_in(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(request: object, timeout: float) -> io.BytesIO:
        raise URLError("no route")

    monkeypatch.setattr(data, "urlopen", unreachable)
    digits = data.load()
    assert digits.train_images.shape == (1500, 8, 8)
    assert digits.test_images.shape == (297, 8, 8)
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "scikit-learn" in out
    assert "no route" in out
