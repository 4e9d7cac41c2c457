"""Attention of other people's models turned into free-energy reads, starting exactly at the model as it was."""

import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AutoConfig, PreTrainedModel

from helmholtz._checks import check_choice, check_keys
from helmholtz.layers.free_energy_gate import FreeEnergyGate

NAME = "helmholtz_free_energy"
"""Of the attention function among those of transformers, and of the entry in ``config.json``."""
GUARD = "helmholtz.interop.hf.load_free_energy"
"""Saved as the attention function that the model wants: transformers has none of this name and refuses to load."""
BACKENDS = ("eager", "sdpa")
SUPPORTED = (
    "BertSelfAttention",
    "GPT2Attention",
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "ViTAttention",
)
"""Classes of attention that the tests go through."""
REFUSED = ("cache", "position_bias", "s_aux", "softcap")
"""Arguments of an attention function that change its weights in ways the read does not follow."""


def use_free_energy(
    model: PreTrainedModel,
    *,
    gates: Literal["channel", "head"] = "channel",
    beta: float = 1.0,
    cap: float = 40.0,
    freeze: bool = False,
) -> list[nn.Parameter]:
    r"""Let every attention layer of ``model`` learn to read free energies in place of means; returns what is new.

    .. math:: y = e^{W_g x} \odot ((1 - \lambda) \mu + \lambda F), \quad \lambda = \alpha\, \sigma(W x), \quad
              F = \beta^{-1} \log \sum_i p(i) e^{\beta v_i}

    ``p`` and ``mu`` are the layer's own weights and mean: masks, caches, windows and grouped heads stay as they are,
    and so do the outputs of the model, bit for bit, until the first step of training. In that step only ``alpha`` and
    ``W_g`` have a gradient, ``W`` and ``beta`` from the second on. The new parameters, ``free_energy.*`` in every
    attention module (:class:`~helmholtz.layers.FreeEnergyGate`), are in the state dict; ``save_pretrained`` then
    ``load_free_energy`` keeps everything.

    Args:
        model: changed in place. Its attention must be one of ``SUPPORTED``, on the implementation "sdpa" or "eager".
        gates, beta, cap: as in ``FreeEnergyGate``.
        freeze: leave only the new parameters trainable.

    Raises: ValueError for a model that is not supported, naming the class, or one that reads free energies already.
    """
    modules = _attention_modules(model)
    _check_backend(model.config._attn_implementation)
    settings = {"gates": gates, "beta": beta, "cap": cap}
    built = [_gate(module, gates, beta, cap) for module in modules]
    if freeze:
        model.requires_grad_(False)
    for module, gate in zip(modules, built, strict=True):
        hook = module.register_forward_pre_hook(_pass_input, with_kwargs=True)
        module.free_energy, module.config = gate.train(module.training), _Config(module.config, hook)
    setattr(model.config, NAME, settings)
    model.config.attn_implementation = GUARD
    return [parameter for gate in built for parameter in gate.parameters()]


def remove_free_energy(model: PreTrainedModel) -> None:
    """Undo ``use_free_energy``: the model is of its own class and function again, with the weights it has now.

    What ``freeze`` froze stays frozen.

    Raises: ValueError if the model does not read free energies.
    """
    modules = _patched_modules(model)
    if not modules:
        raise ValueError(f"model: {type(model).__name__} does not read free energies")
    for module in modules:
        module.config.hook.remove()
        module.config = module.config.base
        del module.free_energy
    delattr(model.config, NAME)
    delattr(model.config, "attn_implementation")


def load_free_energy(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: Literal["sdpa", "eager"] = "sdpa",
) -> PreTrainedModel:
    """The model that ``save_pretrained`` wrote after ``use_free_energy``, of the class it had, in evaluation mode.

    Args:
        dtype: of the weights; None takes what was saved.
        attn_implementation: what computes the mean; transformers does not save it.

    Raises: ValueError if nothing of the kind was saved there, or a weight is missing, left over or of another shape.
    """
    _check_backend(attn_implementation)
    config = AutoConfig.from_pretrained(folder, attn_implementation=attn_implementation)
    settings = getattr(config, NAME, None)
    if settings is None:
        raise ValueError(
            f"folder: {os.fspath(folder)!r} holds a model without free energy; load it with "
            f"{config.architectures} or an Auto class"
        )
    check_keys(f"{NAME} in config.json", settings, ("gates", "beta", "cap"))
    original: Any = getattr(transformers, (config.architectures or ["nothing"])[0], None)
    if original is None:
        raise ValueError(
            f"folder: config.json in {os.fspath(folder)!r} names the architectures {config.architectures}, "
            "wanted a class of transformers"
        )

    def build(self: PreTrainedModel, config: Any) -> None:
        original.__init__(self, config)
        use_free_energy(self, **settings)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    patched: Any = type(original.__name__, (original,), {"__init__": build, **names})  # names decide losses
    model, report = patched.from_pretrained(
        folder, config=config, dtype="auto" if dtype is None else dtype, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, report[kind])) for kind in report if report[kind]}
    if wrong:
        raise ValueError(f"folder: the weights in {os.fspath(folder)!r} are not those of its config: {wrong}")
    model.__class__ = original
    return model


class _Config:
    """Answers as the config of the model, except that attention goes through the free-energy read.

    The model's own config keeps naming the implementation underneath: masks are made for it, and it may be changed.
    """

    _attn_implementation = NAME

    def __init__(self, base: transformers.PreTrainedConfig, hook: RemovableHandle) -> None:
        self.base, self.hook = base, hook

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "hook") or name.startswith("__"):  # while a copy is being built
            raise AttributeError(name)
        return getattr(self.base, name)


def _pass_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The input of an attention module, which its gates see, as one more argument of its attention function."""
    x = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"free_energy_input": x}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    free_energy_input: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: the mean of the one underneath, then the gate."""
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {type(module).__name__} cannot read free energies with it, got one")
    backend = module.config.base._attn_implementation
    _check_backend(backend)
    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(backend, _eager(module))
    mean, weights = attend(module, query, key, value, attention_mask, **kwargs)
    causal = kwargs.get("is_causal")
    causal = module.is_causal if causal is None else causal
    causal = causal and backend == "sdpa" and attention_mask is None and query.shape[2] > 1
    if causal:  # the keys of an empty static cache are longer
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    read = module.free_energy(
        mean,
        free_energy_input,
        query,
        key,
        value,
        mask=attention_mask,
        causal=causal,
        scale=kwargs.get("scaling"),
    )
    return read, weights


AttentionInterface.register(NAME, _attend)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return sys.modules[type(module).__module__].eager_attention_forward


def _check_backend(name: str | None) -> None:
    """The kernels of other names take masks of their own kinds, which the read does not understand."""
    check_choice("attn_implementation", name, BACKENDS)


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """Every module that calls an attention function. Raises: ValueError unless all of them are supported."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: wanted a transformers.PreTrainedModel, got {type(model).__name__}")
    if _patched_modules(model):
        raise ValueError(f"model: this {type(model).__name__} reads free energies already")
    modules = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "scaling")]
    kinds = sorted({type(module).__name__ for module in modules})
    unknown = [kind for kind in kinds if kind not in SUPPORTED]
    if unknown or not modules:
        found = f"attention of class {', '.join(unknown)}" if unknown else "no attention module it knows"
        raise ValueError(
            f"model: {type(model).__name__} has {found}; supported are {', '.join(SUPPORTED)} on "
            "transformers' attention interface"
        )
    for module in modules:
        if getattr(module, "is_cross_attention", False):
            raise ValueError(f"model: cross-attention of {type(module).__name__} is not supported")
        if getattr(module, "reorder_and_upcast_attn", False):
            raise ValueError(
                "model: reorder_and_upcast_attn=True goes past transformers' attention interface"
            )
    return modules


def _patched_modules(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module.__dict__.get("config"), _Config)]


def _gate(module: Any, gates: Literal["channel", "head"], beta: float, cap: float) -> FreeEnergyGate:
    config, like = module.config, next(p for p in module.parameters() if p.is_floating_point())
    d_head = getattr(module, "head_dim", None) or module.attention_head_size
    return FreeEnergyGate(
        config.hidden_size,
        config.num_attention_heads,
        d_head,
        n_kv_heads=getattr(config, "num_key_value_heads", None),
        gates=gates,
        beta=beta,
        cap=cap,
        device=like.device,
        dtype=like.dtype,
    )
