"""IDX files are read strictly; the parts of a set of images share none."""

import gzip

import numpy as np
import pytest
import torch

from helmholtz.experiments.vision.data import FASHION_FOLDER, digits, fashion_mnist, idx_images, read_idx
from image_cases import idx, write_set


@pytest.mark.parametrize("shape", [(7,), (2, 3), (4, 3, 5), (0, 3, 3)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_arrays_of_bytes_are_read_exactly(tmp_path, shape, suffix):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
    assert np.array_equal(read_idx(file), array)
    assert read_idx(file).shape == shape


GOOD = idx(np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file: it begins with nothing"),
        (b"\x89PNG....", "not an IDX file: it begins with 89 50 4e 47"),
        (b"\0\x01" + GOOD[2:], "not an IDX file: it begins with 00 01 08 02"),
        (idx(np.arange(4), kind=13), r"wanted elements of type 8 \(unsigned byte\), got type 13"),
        (GOOD[:11], "its header names 2 dimensions and ends after 11 bytes"),
        (b"\0\0\x08\0", "its header names 0 dimensions and ends after 4 bytes"),
        (GOOD[:-1], "its header promises 2 x 3 = 6 bytes, 5 follow"),
        (GOOD + b"\0", "its header promises 2 x 3 = 6 bytes, 7 follow"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content, message):
    for name, written in (("a", content), ("a.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            read_idx(tmp_path / name)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-9], lambda c: b"xx" + c, lambda c: c[:12] + b"\xff\xff" + c[14:]]
)
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    (tmp_path / "a.gz").write_bytes(damage(gzip.compress(GOOD)))
    with pytest.raises(ValueError, match=r"a\.gz: damaged gzip file"):
        read_idx(tmp_path / "a.gz")


@pytest.mark.parametrize("compressed", [True, False])
def test_a_folder_is_split_into_parts_that_share_no_image(tmp_path, compressed):
    found = idx_images(write_set(tmp_path, compressed=compressed), name="made-up", n_validation=12)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [28, 12, 10]
    assert found.classes == ("0", "1", "2")
    assert found.train.pixels.min() >= 0 and 0.9 < found.train.pixels.max() <= 1
    training = read_idx(next(tmp_path.glob("train-images*"))).reshape(40, -1)
    rows = torch.cat([found.train.pixels, found.validation.pixels]).flatten(1) * 255
    assert {tuple(row) for row in rows.round().int().tolist()} == {tuple(row) for row in training.tolist()}
    test = read_idx(next(tmp_path.glob("t10k-images*")))
    assert torch.equal((found.test.pixels * 255).round().int(), torch.from_numpy(test.copy()).int())


def test_labels_stay_with_their_images_and_the_split_is_the_same_every_time(tmp_path):
    write_set(tmp_path)
    images, labels = (read_idx(next(tmp_path.glob(f"train-{kind}*"))) for kind in ("images", "labels"))
    by_image = {tuple(image.flatten().tolist()): label for image, label in zip(images, labels, strict=True)}
    found, again = (idx_images(tmp_path, name="a", n_validation=5) for _ in range(2))
    for part in (found.train, found.validation):
        for pixels, label in zip((part.pixels * 255).round().int(), part.labels, strict=True):
            assert by_image[tuple(pixels.flatten().tolist())] == label
    assert found.sha256 == again.sha256
    assert idx_images(tmp_path, name="a", n_validation=6).sha256 != found.sha256
    assert len(idx_images(tmp_path, name="a").validation) == 4, "a tenth"


def test_sets_that_do_not_fit_together_are_refused(tmp_path):
    write_set(tmp_path, compressed=False)
    with pytest.raises(ValueError, match="n_validation must be from 1 to 39, got 40"):
        idx_images(tmp_path, name="a", n_validation=40)
    with pytest.raises(ValueError, match="labels must be below 2, the number of classes, got 2"):
        idx_images(tmp_path, name="a", n_validation=4, classes=("x", "y"))
    changes = {
        "t10k-labels-idx1-ubyte": (np.zeros(9), "t10k-labels must be as many as the images, 10, got 9"),
        "train-labels-idx1-ubyte": (np.zeros((40, 1)), "train-labels must be one number per image"),
        "train-images-idx3-ubyte": (np.zeros((40, 6, 5)), r"train-images must be square, got \(6, 5\)"),
        "t10k-images-idx3-ubyte": (
            np.zeros((10, 7, 7)),
            r"t10k-images must be of the size of the training images",
        ),
    }
    for name, (array, message) in changes.items():
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(idx(array))
        with pytest.raises(ValueError, match=message):
            idx_images(tmp_path, name="a")
        (tmp_path / name).write_bytes(before)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither train-images-idx3-ubyte nor .*\.gz is there"):
        idx_images(tmp_path, name="a")


def test_a_missing_fashion_mnist_gives_the_install_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist(tmp_path / "none")


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_the_published_set():
    found = fashion_mnist()
    assert [len(part) for part in (found.train, found.validation, found.test)] == [55000, 5000, 10000]
    assert found.test.labels.bincount().tolist() == [1000] * 10
    assert (found.train.labels.bincount() + found.validation.labels.bincount()).tolist() == [6000] * 10
    assert (len(found.classes), found.classes[9], found.test.labels[0].item()) == (10, "ankle boot", 9)


def test_digits_are_in_three_parts_that_hold_every_class():
    found = digits()
    assert [len(part) for part in (found.train, found.validation, found.test)] == [1097, 300, 400]
    for part in (found.train, found.validation, found.test):
        assert part.pixels.shape[1:] == (8, 8)
        assert (part.pixels.min(), part.pixels.max()) == (0, 1)
        assert part.labels.bincount().min() >= 15
    assert found.sha256 == digits().sha256
