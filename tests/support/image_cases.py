"""Made-up images in the format of MNIST."""

import gzip
import struct

import numpy as np

from helmholtz.experiments.vision.run import VisionRecipe

TINY = VisionRecipe(
    patch_size=2, n_layers=1, d_model=16, n_heads=2, d_ff=32, steps=4, eval_every=2, warmup_steps=1, batch_size=8
)  # fmt: skip


def idx(array, kind=8):
    """An IDX file's bytes; ``kind`` 8 is that of unsigned bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_set(folder, *, n_train=40, n_test=10, side=6, classes=3, compressed=True):
    """A set, every image of its own."""
    generator = np.random.default_rng(3)
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = generator.integers(0, 256, (n, side, side))
        labels = np.arange(n) % classes
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = idx(array)
            file = folder / (f"{name}.gz" if compressed else name)
            file.write_bytes(gzip.compress(content) if compressed else content)
    return folder
