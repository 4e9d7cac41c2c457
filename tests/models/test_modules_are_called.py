"""What users attach to a module acts wherever the model uses it: hooks, adapters, offloading, pruning, quantisation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from decoder_cases import plan_by_tokens, tokens_of
from every_decoder import DECODERS
from helmholtz.models import MODELS
from helmholtz.models.decoder import Decoder
from helmholtz.models.generation import SamplingSettings, generate

TOKENS = tokens_of(2, 9)


@pytest.fixture(autouse=True)
def _plans_are_functions_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_by_tokens(monkeypatch)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def stepped(model: Decoder) -> Tensor:
    """The logits by a prefill and two kinds of steps."""
    state, parts = model.init_state(len(TOKENS)), []
    for part in TOKENS.split([5, 1, 3], dim=1):
        output = model.step(part, state)
        state, parts = output.state, [*parts, output.logits]
    return torch.cat(parts, dim=1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_acts(model: Decoder, before: Tensor) -> Tensor:
    """What was attached changes the logits, and those of a stream equally."""
    after = model(TOKENS).logits
    assert (after - before).abs().max() > 1e-2
    if model.plan is None:  # there the tests' plan is the encoder's of the part that it has seen
        assert_same(stepped(model), after)
    return after


def test_every_architecture_is_among_the_cases() -> None:
    assert {type(build()) for build in DECODERS.values()} == set(MODELS.values())


@torch.no_grad()
def test_every_module_is_called_in_a_whole_pass_and_in_a_stream(model: Decoder) -> None:
    wanted = {
        name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)
    }
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    for run in (lambda: model(TOKENS), lambda: stepped(model)):
        called.clear()
        run()
        # a drop probability of 0 and an empty store of patterns have nothing to compute
        idle = {name for name in wanted - called if name.endswith(("dropout", "store"))}
        assert wanted - called == idle


@torch.no_grad()
def test_hooks_on_the_way_in_and_out_act_in_a_stream_too(model: Decoder) -> None:
    before = model(TOKENS).logits
    name = next(name for name in linears(model) if name.startswith("blocks.1.mixer"))
    handle = linears(model)[name].register_forward_hook(lambda module, args, y: 1.5 * y)
    assert_acts(model, before)
    handle.remove()
    handle = model.blocks[1].mixer.o_proj.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    assert_acts(model, before)
    handle.remove()
    assert torch.equal(model(TOKENS).logits, before)


@torch.no_grad()
def test_a_hook_on_a_block_or_mixer_acts_in_a_stream_too(model: Decoder) -> None:
    def scaled(module: nn.Module, args: Any, out: Any) -> Any:
        return (1.5 * out[0], out[1]) if isinstance(out, tuple) else 1.5 * out

    before = model(TOKENS).logits
    for module in (model.blocks[0], model.blocks[1].mixer):
        handle = module.register_forward_hook(scaled)
        assert_acts(model, before)
        handle.remove()


def test_full_backward_hooks_fire_on_every_linear(model: Decoder) -> None:
    fired: set[str] = set()
    for name, module in linears(model).items():
        module.register_full_backward_hook(lambda *_, name=name: fired.add(name))
    model.train()(TOKENS).logits.square().sum().backward()
    assert linears(model).keys() - fired <= {
        "equilibrium.dynamics.start_proj"
    }  # no equilibrium depends on its start


def test_adapters_learn_act_and_merge(model: Decoder) -> None:
    names = [name for name in linears(model) if name != "unembed"]
    with torch.no_grad():
        before = model(TOKENS).logits
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    inject_adapter_in_model(config, model)
    model(TOKENS).logits.square().sum().backward()
    adapters = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert len(adapters) == len(names)
    for name, layer in adapters.items():
        if "start_proj" not in name:
            assert layer.lora_A["default"].weight.grad.abs().max() > 0, name
            assert layer.lora_B["default"].weight.grad.abs().max() > 0, name
    with torch.no_grad():
        apart = assert_acts(model, before)
        for layer in adapters.values():
            layer.merge()
        assert_same(model(TOKENS).logits, apart)


@pytest.mark.parametrize("where", ["cpu", "cpu, buffers too", "disk", "one block on disk"])
@torch.no_grad()
def test_offloaded_weights_are_brought_back_for_every_use(model: Decoder, where: str, tmp_path: Path) -> None:
    expected, prompts = model(TOKENS).logits, [[1, 2, 3], [4]]
    settings = SamplingSettings(max_new_tokens=4, temperature=0)
    texts = generate(model, prompts, settings)
    if where.startswith("cpu"):
        cpu_offload(model, execution_device="cpu", offload_buffers="buffers" in where)
    elif where == "disk":
        disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        device_map = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
        device_map |= {f"blocks.{i}": "disk" if i == 1 else "cpu" for i in range(len(model.blocks))}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert_same(model(TOKENS).logits, expected)
    assert generate(model, prompts, settings) == texts


def _pruned(module: nn.Linear) -> None:
    prune.random_unstructured(module, "weight", 0.5)


def _weight_norm(module: nn.Linear) -> None:
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(1.5)


REPARAMETRISED: dict[str, Callable[[nn.Linear], Any]] = {
    "pruning": _pruned,
    "spectral norm, by hooks": spectral_norm,
    "spectral norm, parametrised": parametrizations.spectral_norm,
    "weight norm": _weight_norm,
}


@pytest.mark.parametrize("how", REPARAMETRISED)
@torch.no_grad()
def test_a_weight_made_of_others_is_the_one_that_acts(model: Decoder, how: str) -> None:
    before = model(TOKENS).logits
    for name, module in linears(model).items():
        if name.startswith("blocks.1"):
            REPARAMETRISED[how](module)
    after = assert_acts(model, before)
    model(TOKENS)
    weights = {name: module.weight.clone() for name, module in linears(model).items()}
    for name, module in linears(model).items():
        if name.startswith("blocks.1"):
            parent, _, last = name.rpartition(".")
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.copy_(weights[name])
            if module.bias is not None:
                plain.bias.copy_(module.bias)
            setattr(model.get_submodule(parent), last, plain)
    assert_same(model(TOKENS).logits, after)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_dynamically_quantised_weights_run(model: Decoder) -> None:
    before = model(TOKENS).logits
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not linears(quantised)
    after = quantised(TOKENS).logits
    assert 0 < (after - before).norm() < 0.2 * before.norm()


@torch.no_grad()
def test_generation_follows_what_was_changed_in_one_place(model: Decoder) -> None:
    settings = SamplingSettings(max_new_tokens=6, temperature=0)
    model.blocks[1].mixer_norm.eps = 10.0
    if hasattr(model.blocks[0].mixer, "rope_theta"):
        model.blocks[0].mixer.rope_theta = 3.0
    state = model.step(torch.tensor([[1, 2, 3]]), model.init_state(1))
    expected = []
    for _ in range(6):
        expected.append(int(state.logits[0, -1].argmax()))
        state = model.step(torch.tensor([[expected[-1]]]), state.state)
    if model.plan is None:
        assert generate(model, [[1, 2, 3]], settings) == [expected]
    head = nn.Linear(model.config.d_model, model.config.vocab_size)
    head.bias[7] = 1e4
    model.unembed = head
    assert generate(model, [[1, 2, 3]], settings) == [[7] * 6]
