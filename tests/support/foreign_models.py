"""Tiny models of transformers, with random weights, and how to move their free energy away from the start."""

import torch
import transformers
from torch import Tensor

from helmholtz.interop.hf.free_energy import use_free_energy

VOCABULARY = 31
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
ENCODERS = ("bert", "vit")
BACKENDS = ("sdpa", "eager")
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = TEXT | {
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def make(name: str, *, backend: str = "sdpa", dropout: float = 0.0, **changes):
    """The model in evaluation mode."""
    torch.manual_seed(0)
    drop = {"attention_dropout": dropout}
    bert = {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
    model_class, config = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**ROTARY | drop | changes)),
        "mistral": (
            transformers.MistralForCausalLM,
            transformers.MistralConfig(**ROTARY | drop | {"sliding_window": 4} | changes),
        ),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**ROTARY | drop | changes)),
        "qwen3": (
            transformers.Qwen3ForCausalLM,
            transformers.Qwen3Config(**ROTARY | drop | {"head_dim": 6} | changes),
        ),
        "gpt2": (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(
                **{"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
                | {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
                | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
                | changes
            ),
        ),
        "bert": (
            transformers.BertForMaskedLM,
            transformers.BertConfig(**TEXT | bert | {"intermediate_size": 24} | changes),
        ),
        "vit": (
            transformers.ViTForImageClassification,
            transformers.ViTConfig(
                **{
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 24,
                }
                | {"image_size": 8, "patch_size": 4, "num_labels": 5}
                | bert
                | changes
            ),
        ),
    }[name]
    config._attn_implementation = backend
    model = model_class(config)
    with torch.no_grad():  # sharper than at their initialisation
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs(name: str, *, times: int = 9) -> dict[str, Tensor]:
    """Two rows; text with a padding mask, on the left for decoders."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    tokens = torch.randint(2, VOCABULARY, (2, times), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    mask = mask if name in DECODERS else mask.flip(1)
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def real(name: str, given: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The logits of real tokens."""
    return logits if name == "vit" else logits[given["attention_mask"] == 1]


@torch.no_grad()
def liven(model, *, size: float = 0.3):
    """Every new parameter away from the start."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".free_energy." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(size * noise + (1.0 if name.endswith("alpha") else 0.0))
    return model


def livened(name: str, **options):
    model = make(name, **options)
    use_free_energy(model)
    return liven(model)
