"""MNIST by rows: from a folder, else downloaded, else the digits that scikit-learn ships.

A folder that the caller names (``--data`` or ``FASTLSTM_DATA``) is read or refused, never replaced
by something else. Every file is checked against the SHA-256 of the official distribution.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from .. import BenchmarkError, extra

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
IMAGES, LABELS = 0x803, 0x801  # magic numbers: unsigned bytes in 3 dimensions, in 1 dimension
DIGITS_FOR_TRAINING = 1500  # of the 1,797 digits in scikit-learn; the other 297 are the test set


TIMEOUT = 10  # seconds


class DataError(BenchmarkError):
    """A data file is missing, damaged or not the one expected."""


class NoNetwork(Exception):
    """No mirror of the data can be reached."""


@dataclass(frozen=True)
class File:
    """One file of MNIST: its name without ``.gz``, and the SHA-256 of both of its forms."""

    name: str
    magic: int
    sha256_gz: str
    sha256_raw: str

    def forms(self, folder: Path) -> tuple[tuple[Path, str], tuple[Path, str]]:
        """Where the file may be in `folder`, compressed or not, each with its checksum."""
        return (
            (folder / f"{self.name}.gz", self.sha256_gz),
            (folder / self.name, self.sha256_raw),
        )

    def at(self, folder: Path) -> tuple[Path, str]:
        """The form that is there; `DataError` when none is."""
        for path, sha256 in self.forms(folder):
            if path.is_file():
                return path, sha256
        raise DataError(
            f"{folder / self.name}.gz is missing: expected a file with SHA-256 {self.sha256_gz}, "
            f"or {self.name} (uncompressed) with SHA-256 {self.sha256_raw}"
        )


FILES = (
    File(
        "train-images-idx3-ubyte",
        IMAGES,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    File(
        "train-labels-idx1-ubyte",
        LABELS,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    File(
        "t10k-images-idx3-ubyte",
        IMAGES,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    File(
        "t10k-labels-idx1-ubyte",
        LABELS,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)


@dataclass(frozen=True)
class Digits:
    """Images as sequences of rows, float32 in 0..1 ``[N, T, I]``, and labels, int64 ``[N]``."""

    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> Digits:
        """The same digits on `device`."""
        return Digits(
            self.source,
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option that says where the digits are."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files of MNIST, .gz or not (default: $FASTLSTM_DATA, else "
        "downloaded to ~/.cache/fastlstm/mnist, else the small digits of scikit-learn)",
    )


def load(folder: str | Path | None = None) -> Digits:
    """The digits of `folder`, else of ``FASTLSTM_DATA``, else downloaded, else scikit-learn's.

    A download is kept in ``$FASTLSTM_CACHE/mnist`` (``~/.cache/fastlstm/mnist`` by default).
    Prints in one line which digits it took. Raises `DataError` when a file is missing or damaged;
    only a missing network leads to scikit-learn's digits.
    """
    named = folder if folder is not None else os.environ.get("FASTLSTM_DATA")
    if named:
        folder = Path(named)
    else:
        cache = os.environ.get("FASTLSTM_CACHE") or "~/.cache/fastlstm"
        folder = Path(cache).expanduser() / "mnist"
        try:
            download(folder)
        except NoNetwork as error:
            digits = small_digits()
            print(f"data: {digits.source} (MNIST could not be downloaded: {error})")
            return digits
    digits = read_mnist(folder)
    print(f"data: {digits.source}, from {folder}")
    return digits


def read_mnist(folder: Path) -> Digits:
    """The four official files in `folder`, ``.gz`` or not; `DataError` if one is not right."""
    arrays = []
    for file in FILES:
        path, sha256 = file.at(folder)
        arrays.append(read_idx(path, file.magic, sha256))
    train_images, train_labels, test_images, test_labels = arrays
    return Digits(
        f"MNIST, {len(train_images):,} training and {len(test_images):,} test images of 28x28",
        train_images.float() / 255,
        train_labels.long(),
        test_images.float() / 255,
        test_labels.long(),
    )


def read_idx(path: Path, magic: int, sha256: str) -> Tensor:
    """The uint8 array in an IDX file, gzipped if its name ends in ``.gz``.

    Raises `DataError`, naming the file, when its checksum, its magic number or its size is wrong.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} is not the expected file: expected SHA-256 {sha256}, found {found} "
            f"({len(content):,} bytes); replace it by the original"
        )
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is not a whole gzip file: {error}") from error
    found_magic = int.from_bytes(content[:4], "big")
    if found_magic != magic:
        raise DataError(
            f"{path}: expected the IDX magic number {magic:#x}, found {found_magic:#x}"
        )
    header = 4 + 4 * (magic & 0xFF)
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    size = torch.Size(shape).numel()
    if len(content) != header + size:
        raise DataError(
            f"{path}: expected {header + size:,} bytes for the shape {shape} in its header, "
            f"found {len(content):,}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def download(folder: Path) -> None:
    """Completes `folder` with the official files, each from the first mirror that answers.

    Raises `NoNetwork` when none does, `DataError` when it delivers another file or `folder` cannot
    be written.
    """
    missing = [file for file in FILES if not any(path.is_file() for path, _ in file.forms(folder))]
    for file in missing:
        name = f"{file.name}.gz"
        content = _fetch(name)
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256_gz:
            raise DataError(
                f"{name}, as downloaded, is not the expected file: expected SHA-256 "
                f"{file.sha256_gz}, found {found}; name a folder that has the file with --data"
            )
        # Written aside and renamed, so that an interrupted run leaves no half file behind.
        partial = folder / f"{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(folder / name)
        except OSError as error:
            raise DataError(
                f"{folder} cannot keep the download: {error}; set FASTLSTM_CACHE to another folder"
            ) from error


def _fetch(name: str) -> bytes:
    tqdm = extra("tqdm").tqdm
    for mirror in MIRRORS:
        request = Request(mirror + name, headers={"User-Agent": "fastlstm"})
        try:
            with urlopen(request, timeout=TIMEOUT) as response:
                size = response.headers.get("Content-Length")
                with tqdm(desc=name, total=size and int(size), unit="B", unit_scale=True) as bar:
                    content = bytearray()
                    while chunk := response.read(1 << 16):
                        content += chunk
                        bar.update(len(chunk))
            return bytes(content)
        except OSError as error:
            failure = error
    raise NoNetwork(str(failure))


def small_digits() -> Digits:
    """The 1,797 handwritten digits of 8x8 that scikit-learn ships."""
    bunch = extra("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    n = DIGITS_FOR_TRAINING
    return Digits(
        f"the {len(images):,} handwritten digits of 8x8 in scikit-learn, {n:,} for training and "
        f"{len(images) - n} for test",
        images[:n],
        labels[:n],
        images[n:],
        labels[n:],
    )
