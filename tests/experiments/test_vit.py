"""The vision transformer reads patches in reading order, and knows their places by its positions alone."""

import pytest
import torch

from fem_cases import stir
from helmholtz.experiments.vision.models import ViT, ViTConfig, patches


def make(mixer, **options):
    sizes = {"image_size": 6, "patch_size": 2, "n_classes": 4, "d_model": 16, "n_heads": 2, "d_ff": 64}
    return stir(ViT(ViTConfig(mixer=mixer, **sizes | options)).double().eval(), scale=0.2)


def test_patches_go_from_left_to_right_and_from_top_to_bottom():
    image = torch.arange(16.0).view(1, 4, 4)
    assert patches(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert patches(image, 4)[0].tolist() == [list(range(16))]


def shuffled(images, order):
    tiles = patches(images, 2)[:, order].view(-1, 3, 3, 2, 2)
    return tiles.permute(0, 1, 3, 2, 4).reshape(-1, 6, 6)


def test_without_positions_attention_does_not_know_where_a_patch_is_and_with_them_it_does():
    images, order = torch.rand(3, 6, 6, dtype=torch.float64), torch.randperm(9)
    model = make("attention")
    assert (model(shuffled(images, order)) - model(images)).abs().max() > 1e-3
    model.positions.data.zero_()
    torch.testing.assert_close(model(shuffled(images, order)), model(images))
    scanned = make("fem")
    scanned.positions.data.zero_()
    assert (scanned(shuffled(images, order)) - scanned(images)).abs().max() > 1e-3, (
        "its conditioning is a scan"
    )


@pytest.mark.parametrize("mixer", ["attention", "fem"])
def test_images_do_not_see_each_other_and_every_pixel_matters(mixer):
    model, images = make(mixer), torch.rand(4, 6, 6, dtype=torch.float64)
    assert model(images).shape == (4, 4)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))
    jacobian = torch.autograd.functional.jacobian(
        lambda x: model(x)[0] @ torch.arange(4.0).double(), images[:1]
    )
    assert (jacobian.abs() > 1e-9).all()


def test_both_mixers_hold_equal_parameters_and_all_of_them_learn():
    models = [make(mixer, d_model=64, n_heads=4, d_ff=128) for mixer in ("attention", "fem")]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert abs(counts[0] - counts[1]) <= 0.01 * counts[0]
    for model in models:
        model(torch.rand(2, 6, 6, dtype=torch.float64)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_wrong_sizes_are_refused():
    with pytest.raises(
        ValueError, match="patch_size must divide image_size, got patch_size=4 and image_size=6"
    ):
        ViTConfig(image_size=6, patch_size=4, n_classes=3, mixer="fem")
    with pytest.raises(ValueError, match="n_classes must be an integer of at least 2, got 1"):
        ViTConfig(image_size=6, patch_size=2, n_classes=1, mixer="fem")
    with pytest.raises(ValueError, match="images: wanted 6 x 6 pixels, got 8 x 8"):
        make("attention")(torch.rand(1, 8, 8).double())
