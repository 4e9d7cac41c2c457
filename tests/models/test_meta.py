"""Every module of the library can be built without memory, given memory and filled from a state dict.

A table that is neither a parameter nor in the state dict would stay unfilled. A new module class has to join a case.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import helmholtz
from decoder_cases import codes_of, tokens_of
from helmholtz.experiments.forecasting.models import (
    DLinear,
    EncoderForecaster,
    ForecasterConfig,
    SeasonalNaive,
)
from helmholtz.experiments.mad.data import Compression, InContextRecall
from helmholtz.experiments.mad.models import MODELS as MAD_MODELS
from helmholtz.experiments.mad.models import MadSizes, _build
from helmholtz.experiments.vision.models import ViT, ViTConfig
from helmholtz.interop.hf import HelmholtzForCausalLM
from helmholtz.interop.seeds.fem import FreeEnergyMixer as SeedMixer
from helmholtz.interop.seeds.fem import FreeEnergyMixerConfig as SeedMixerConfig
from helmholtz.interop.seeds.free_transformer.config import ModelConfig as SeedConfig
from helmholtz.interop.seeds.free_transformer.losses import FreeTransformerLoss
from helmholtz.interop.seeds.free_transformer.model import (
    BinaryMapper,
    EncoderBlock,
    FreeTransformer,
    InjectionMechanism,
    LatentPlan,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    TransformerBaseline,
    TransformerBlock,
)
from helmholtz.interop.seeds.unified.model import UnifiedMambaHopfieldDEQ
from helmholtz.layers.free_energy_attention import FreeEnergyAttention
from helmholtz.layers.key_value_memory import KeyValueMemory, NGramKeys
from helmholtz.layers.latent import Plan
from helmholtz.models.decoder import Decoder
from helmholtz.training.objectives import learned, next_token
from helmholtz.training.parallel import LossModule
from hf_cases import CORES
from hybrid_cases import hybrid_config

TOKENS = tokens_of(2, 12)
SEED = SeedConfig(vocab_size=37, hidden_dim=32, num_layers=4, num_heads=2, ffn_hidden_dim=32, latent_dim=3)
MAD = MadSizes(d_model=16, n_heads=2, d_ff=48, n_patterns=4)


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _recall(memory: KeyValueMemory) -> object:
    return memory.read(_x(3, 8)).value


def _anew(model: Decoder) -> Callable[[], nn.Module]:
    """A model of these sizes into which nothing was written."""
    return lambda: type(model)(model.config)


Case = tuple[Callable[[], nn.Module], Callable[[Any], object]]
"""How to build a module, and something it computes."""
CASES: dict[str, Case] = {
    **{name: (_anew(core()), lambda m: m(TOKENS).logits) for name, core in CORES.items()},
    "hybrid": (
        lambda: Decoder(hybrid_config("mixed", "middle", "equilibrium")),
        lambda m: m(TOKENS).logits,
    ),
    "hf": (
        lambda: HelmholtzForCausalLM(HelmholtzForCausalLM.of(CORES["free"]()).config),
        lambda m: m(TOKENS).logits,
    ),
    "loss_module": (lambda: LossModule(CORES["transformer"](), next_token, learned), lambda m: m(TOKENS, 0)),
    **{
        f"mad {name}": (
            lambda name=name: _build(name, Compression(vocab_size=8, seq_len=12), MAD, 8),
            lambda m: m(TOKENS % 8).logits,
        )
        for name in MAD_MODELS
    },
    "mad language": (
        lambda: _build("attention", InContextRecall(vocab_size=8, seq_len=12), MAD, 8),
        lambda m: m(TOKENS % 8).logits,
    ),
    "vit": (
        lambda: ViT(ViTConfig(image_size=8, patch_size=4, n_classes=3, mixer="fem", d_model=16, n_heads=2)),
        lambda m: m(_x(2, 8, 8)),
    ),
    "forecaster": (
        lambda: EncoderForecaster(
            ForecasterConfig(look_back=32, horizon=5, axis="time", mixer="fem", d_model=16, n_heads=2)
        ),
        lambda m: m(_x(2, 32, 3)),
    ),
    "dlinear": (lambda: DLinear(32, 5), lambda m: m(_x(2, 32, 3))),
    "naive": (lambda: SeasonalNaive(5), lambda m: m(_x(2, 32, 3))),
    "free energy attention": (
        lambda: FreeEnergyAttention(16, 2, batch_first=True),
        lambda m: m(_x(2, 5, 16), _x(2, 5, 16), _x(2, 5, 16))[0],
    ),
    "n-gram keys": (lambda: NGramKeys(37, 8), lambda m: m(TOKENS)),
    "key-value memory": (lambda: KeyValueMemory(8, 5, 4), _recall),
    "seed mixer": (lambda: SeedMixer(SeedMixerConfig(n_embd=32, n_head=2)), lambda m: m(_x(2, 6, 32))),
    "seed free transformer": (lambda: FreeTransformer(SEED), lambda m: m(TOKENS)),
    "seed baseline": (lambda: TransformerBaseline(SEED), lambda m: m(TOKENS)),
    "seed encoder": (lambda: EncoderBlock(32, 2, 48, 3), lambda m: m(_x(2, 6, 32))),
    "seed block": (lambda: TransformerBlock(32, 2, None, 48), lambda m: m(_x(2, 6, 32))),
    "seed mapper": (lambda: BinaryMapper(3), lambda m: m(_x(2, 6, 3))),
    "seed plan": (lambda: LatentPlan(5, 8), lambda m: m.project_to_hidden(Plan(codes_of(2, 6)))),
    "seed injection": (lambda: InjectionMechanism(8), lambda m: m(_x(2, 6, 8), _x(2, 6, 8))),
    "seed norm": (lambda: RMSNorm(8), lambda m: m(_x(2, 6, 8))),
    "seed rotary": (lambda: RotaryEmbedding(8), lambda m: m(_x(2, 6, 2, 8), _x(2, 6, 2, 8))),
    "seed swiglu": (lambda: SwiGLU(8, 16), lambda m: m(_x(2, 6, 8))),
    "seed loss": (FreeTransformerLoss, lambda m: m(_x(2, 12, 37), TOKENS, _x(2, 12, 16))[0]),
    "seed deq": (
        lambda: UnifiedMambaHopfieldDEQ(37, 32, 8, n_layers=2, memory_size=8),
        lambda m: m(TOKENS),
    ),
}


def _classes() -> Iterator[type[nn.Module]]:
    for info in pkgutil.walk_packages(helmholtz.__path__, "helmholtz."):
        if info.name.startswith("helmholtz.ops.triton"):  # a package that need not be there
            continue
        module = importlib.import_module(info.name)
        for kind in vars(module).values():
            here = inspect.isclass(kind) and kind.__module__ == module.__name__
            if here and issubclass(kind, nn.Module) and not inspect.isabstract(kind):
                yield kind


def test_every_module_is_in_a_case() -> None:
    inside = {type(module) for build, _ in CASES.values() for module in build().modules()}
    assert {kind.__qualname__ for kind in set(_classes()) - inside} == set()


def _drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """Everything random, so that nothing stays where it starts."""
    torch.manual_seed(1)
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return module


def _outputs(compute: Callable[[Any], object], module: nn.Module) -> list[Tensor]:
    torch.manual_seed(2)  # of what is drawn in a forward pass
    with torch.no_grad():
        found = compute(module)
    leaves = torch.utils._pytree.tree_leaves(found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_a_module_from_the_meta_device_computes_the_same(name: str) -> None:
    build, compute = CASES[name]
    module = _drawn(build)
    want = _outputs(compute, module)
    assert want
    for assign in (False, True):
        with torch.device("meta"):
            fresh = build()
        if not assign:
            fresh.to_empty(device="cpu")
        fresh.load_state_dict(module.state_dict(), strict=True, assign=assign)
        _check_no_table_beside(fresh.eval())
        for a, b in zip(want, _outputs(compute, fresh), strict=True):
            assert torch.equal(a, b), f"assign={assign}"


def _check_no_table_beside(module: nn.Module) -> None:
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    assert tensors <= {*module.state_dict()}
    for path, part in module.named_modules():
        cached = [name for name, value in vars(part).items() if isinstance(value, Tensor)]
        assert not cached, f"{path}: tensors that no state dict holds: {cached}"
