"""Training step and generation of the Free Transformer, next to the plain decoder and to the PyPI package of that name.

    pip install --no-deps free-transformer==0.1.2      # the peer, for this benchmark only
    python benchmarks/models/planned.py --threads 2

The peer's ``small`` configuration: vocabulary 1000, D 128, 4 layers, 4 heads, feed-forward 512, 8 x 128 tokens; text of
16 + 48 tokens at batch 1. A training step is loss, backward, clipping and AdamW. The peer is timed with our fused AdamW
and, as ``peer, torch's default``, with the AdamW that its users get.

Floor: a step multiplies 6 x 1.44 M weights per token, 8.8 GFLOP; 16 bits add 2 x 65,536 x 128 x 1024 = 17.2 GFLOP in
the table's backward, which is timed alone as ``floor_of_the_table``. The peer recomputes all tokens for each new one.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import gate, interleave, parse_options, print_table, write_results

from helmholtz.layers.latent import Plan
from helmholtz.models import FreeTransformer, Transformer
from helmholtz.models.free_transformer import FreeTransformerConfig
from helmholtz.models.generation import SamplingSettings, generate, generate_planned
from helmholtz.models.transformer import TransformerConfig
from helmholtz.training.config import TrainConfig
from helmholtz.training.free_bits import FreeBitsConfig, FreeBitsObjective
from helmholtz.training.objectives import next_token
from helmholtz.training.optim import make_optimizer

try:
    from free_transformer import FreeTransformer as PeerModel
    from free_transformer import ModelConfig as PeerConfig
    from free_transformer import compute_vae_loss as peer_loss
except ImportError:
    sys.exit("the peer is missing: pip install --no-deps free-transformer==0.1.2")

VOCABULARY, BATCH, TIME, PROMPT, NEW = 1000, 8, 128, 16, 48
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, d_model=128, n_layers=4, n_heads=4, d_ff=512, max_seq_len=512
)
BITS = (8, 16)
KAPPA_BITS = 0.5
CLIP = 1.0


def ours() -> dict[str, Transformer | FreeTransformer]:
    models: dict[str, Transformer | FreeTransformer] = {"decoder": Transformer(TransformerConfig(**SIZES))}
    for bits in BITS:
        models[f"ours, H={bits}"] = FreeTransformer(FreeTransformerConfig(**SIZES, n_latent_bits=bits))
    return models


def peers() -> dict[str, nn.Module]:
    sizes = dict(vocab_size=VOCABULARY, hidden_dim=128, num_layers=4, num_heads=4, ffn_hidden_dim=512)
    return {
        f"peer, H={bits}": PeerModel(PeerConfig(**sizes, max_seq_len=512, latent_dim=bits)) for bits in BITS
    }


@torch.no_grad()
def check(model: Transformer | FreeTransformer) -> None:
    """Greedy generation against full passes under the codes it used."""
    prompt, settings = list(range(1, PROMPT + 1)), SamplingSettings(max_new_tokens=8, temperature=0)
    if isinstance(model, FreeTransformer):
        row = generate_planned(model, [prompt], settings)[0]
        tokens, z = row.tokens, {"z": Plan(torch.tensor([row.codes[:-1]]))}
    else:
        tokens, z = generate(model, [prompt], settings)[0], {}
    logits = model(torch.tensor([prompt + tokens[:-1]]), **z).logits[0, PROMPT - 1 :]
    if logits.argmax(-1).tolist() != tokens:
        raise RuntimeError(f"{tokens} were generated, full passes say {logits.argmax(-1).tolist()}")
    state = model.step(torch.tensor([prompt]), model.init_state(1), **_first(z, PROMPT)).state
    step = model.step(torch.tensor([tokens[:1]]), state, **_at(z, PROMPT)).logits[0, -1]
    gate("step", {"logits": step}, {"logits": logits[1]}, budget=200)


def _first(z: dict[str, Plan], n: int) -> dict[str, Plan]:
    return {name: Plan(plan.code[:, :n]) for name, plan in z.items()}


def _at(z: dict[str, Plan], n: int) -> dict[str, Plan]:
    return {name: Plan(plan.code[:, n : n + 1]) for name, plan in z.items()}


def training(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], tokens: Tensor
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def training_steps(tokens: Tensor) -> dict[str, Callable[[], None]]:
    config = TrainConfig(lr=1e-3)
    objective = FreeBitsObjective(FreeBitsConfig(kappa_bits=KAPPA_BITS))
    steps: dict[str, Callable[[], None]] = {}
    for name, model in ours().items():
        ask = objective if isinstance(model, FreeTransformer) else next_token
        steps[name] = training(
            model,
            make_optimizer(model, config),
            lambda x, model=model, ask=ask: ask(model, x, 0).loss,
            tokens,
        )
    for suffix, make in (("", make_optimizer), (", torch's default", _default)):
        for name, model in peers().items():
            bits = int(name.split("=")[1])
            steps[name + suffix] = training(
                model,
                make(model, config),
                lambda x, model=model, bits=bits: _peer_loss(model, x, bits),
                tokens,
            )
    return steps


def _default(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.lr)


def _peer_loss(model: nn.Module, tokens: Tensor, bits: int) -> Tensor:
    logits, z_logits = model(tokens[:, :-1], mode="training")
    return peer_loss(logits, tokens[:, 1:], z_logits, latent_dim=bits)[0]


def generations(tokens: Tensor) -> dict[str, Callable[[], Any]]:
    prompt, runs = tokens[:1, :PROMPT], dict[str, Callable[[], Any]]()
    for name, model in ours().items():
        check(model.eval())
        for count in (NEW, 1):
            settings = SamplingSettings(max_new_tokens=count)
            runs[f"{name}, {count} tokens"] = lambda model=model, settings=settings: generate(
                model, prompt.tolist(), settings
            )
    for name, model in peers().items():
        model.eval()
        runs[f"{name}, {NEW} tokens"] = torch.no_grad()(
            lambda model=model: model.generate(prompt, max_new_tokens=NEW)
        )
    return runs


def _decode_ms(texts: dict[str, float], name: str) -> float:
    """Milliseconds per token without the prompt and the first token."""
    whole, prompt = (texts.get(f"{name}, {count} tokens", float("nan")) for count in (NEW, 1))
    return 1e3 * (whole - prompt) / (NEW - 1)


def floor_of_the_table() -> Callable[[], None]:
    table, grad = torch.randn(1 << max(BITS), SIZES["d_model"]), torch.randn(BATCH * TIME, SIZES["d_model"])
    out = torch.empty(256, 2048)

    def product() -> None:
        for rows in grad.split(256):
            for codes in table.split(2048):
                torch.mm(rows, codes.T, out=out)

    return product


def main() -> None:
    options = parse_options("free_transformer", __doc__, rounds=15)
    tokens = torch.randint(VOCABULARY, (BATCH, TIME + 1))
    steps = interleave(
        {**training_steps(tokens), "floor_of_the_table": floor_of_the_table()}, rounds=options.rounds
    )
    texts = interleave(generations(tokens), rounds=options.rounds)
    rows = [
        {
            "model": name,
            "train_ms": 1e3 * seconds,
            "train_tokens_per_s": BATCH * TIME / seconds,
            "train_to_decoder": seconds / steps["decoder"],
            "ms_per_new_token": 1e3 * texts.get(f"{name}, {NEW} tokens", float("nan")) / NEW,
            "decode_ms": _decode_ms(texts, name),
            "decode_to_decoder": _decode_ms(texts, name) / _decode_ms(texts, "decoder"),
        }
        for name, seconds in steps.items()
    ]
    print_table(rows)
    for bits in BITS:
        mine, theirs = f"ours, H={bits}", f"peer, H={bits}"
        faster = texts[f"{theirs}, {NEW} tokens"] / texts[f"{mine}, {NEW} tokens"]
        default = steps[f"{theirs}, torch's default"] / steps[mine]
        print(
            f"H={bits}: training {steps[theirs] / steps[mine]:.2f} x the peer ({default:.2f} x with its default"
            f" AdamW), generation {faster:.2f} x"
        )
    write_results(options, rows)


if __name__ == "__main__":
    main()
