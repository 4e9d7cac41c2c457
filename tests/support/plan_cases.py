"""Free Transformers whose plans are known to decide everything, or nothing."""

import torch

from decoder_cases import make_free
from helmholtz.models.free_transformer import FreeTransformer


@torch.no_grad()
def ruled_by_its_plan(**fields: object) -> FreeTransformer:
    """Each next token is a function of the codes so far: of the mean of their vectors, which drowns the text."""
    model = make_free(tie_embeddings=False, **fields)
    for block in model.blocks:
        block.mlp.down_proj.weight.zero_()
        block.mixer.o_proj.weight.zero_()
    mixer = model.blocks[model.plan.layer].mixer
    mixer.in_proj.weight[: model.config.d_model] = 0  # equal scores: every code so far counts the same
    mixer.o_proj.weight.copy_(1000 * torch.eye(model.config.d_model))
    model.post_sampler.weight.mul_(1000)
    model.norm.weight.fill_(3000)
    return model


@torch.no_grad()
def deaf_to_its_plan(**fields: object) -> FreeTransformer:
    """The table is 0."""
    model = make_free(**fields)
    model.post_sampler.weight.zero_()
    return model
