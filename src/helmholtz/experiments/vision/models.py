"""A small vision transformer whose mixer is attention or FEM."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helmholtz._checks import check_divides, check_integer
from helmholtz.layers.init import init_normal, init_weight
from helmholtz.models.encoder import Encoder, EncoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """Sizes of a vision transformer for square grey images, and those of its encoder."""

    image_size: int
    """Pixels along a side."""
    patch_size: int
    """Pixels along a side of a patch; a divisor of image_size."""
    n_classes: int

    def __post_init__(self) -> None:
        EncoderConfig.__post_init__(self)
        check_integer("image_size", self.image_size)
        check_divides("patch_size", self.patch_size, "image_size", self.image_size)
        check_integer("n_classes", self.n_classes, minimum=2)

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class ViT(nn.Module):
    """Patches row by row with learned positions, an encoder, the mean of its tokens, and a linear map to the classes.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with the mean in place of a class token.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Linear(c.patch_size**2, c.d_model)
        self.positions = nn.Parameter(torch.empty(c.n_patches, c.d_model))
        self.encoder = Encoder(c, order="given")
        self.head = nn.Linear(c.d_model, c.n_classes)
        init_normal(self.embed)
        init_normal(self.head)
        init_weight(self.positions, c.d_model)

    def forward(self, images: Float[Tensor, "B S S"]) -> Float[Tensor, "B classes"]:
        """Logits of the classes."""
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size):
            got = " x ".join(map(str, images.shape[1:]))
            raise ValueError(f"images: wanted {c.image_size} x {c.image_size} pixels, got {got}")
        tokens = self.embed(patches(images, c.patch_size)) + self.positions
        return self.head(self.encoder(tokens).mean(1))


def patches(images: Float[Tensor, "B S S"], size: int) -> Float[Tensor, "B N _"]:
    """Square patches from left to right and from top to bottom, the pixels of each in the same order."""
    tiles = images.unfold(1, size, size).unfold(2, size, size)
    return tiles.flatten(3).flatten(1, 2)
