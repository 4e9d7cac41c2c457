"""Every model of ``MODELS`` as a model of transformers: ``generate``, ``Trainer``, ``save_pretrained``, Auto."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from helmholtz._checks import check
from helmholtz.interop.hf.cache import StateCache
from helmholtz.interop.hf.config import MODEL_TYPE, HelmholtzConfig
from helmholtz.interop.hf.losses import read_with_loss
from helmholtz.interop.hf.plans import read_planned, seeds_of
from helmholtz.models import MODELS
from helmholtz.models.base import AbstractDecoder, LMOutput
from helmholtz.models.free_transformer import FreeTransformer, PlannedState
from helmholtz.models.tied import is_tied


class HelmholtzForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of this library behind the interface of transformers.

    The weights are those of ``model`` under the prefix ``model.``, buffers of writable memories included; tied weights
    are stored once. Options of backends are in the config of the model inside: transformers' own
    ``attn_implementation`` chooses nothing here.

    Attributes:
        model: the model itself; all of this library takes it.
    """

    config_class = HelmholtzConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    _is_stateful = True  # a recurrent state cannot be cut back: transformers then refuses assisted decoding
    _tied_weights_keys = {"model.unembed.weight": "model.embed.weight"}

    def __init__(self, config: HelmholtzConfig) -> None:
        super().__init__(config)
        self.model: AbstractDecoder = MODELS[config.architecture](config.core_config())
        self.post_init()

    @classmethod
    def of(cls, model: AbstractDecoder) -> "HelmholtzForCausalLM":
        """``model`` itself in the interface of transformers, in the mode it is in; nothing is copied.

        Raises: ValueError for a model that is none of ``MODELS``.
        """
        names = [name for name, kind in MODELS.items() if kind is type(model)]
        check(bool(names), "model", type(model).__name__, f"one of the architectures {sorted(MODELS)}")
        with torch.device("meta"):
            wrapper = cls(HelmholtzConfig.of(names[0], model.config))
        wrapper.model = model
        wrapper._note_ties()
        wrapper.config.dtype = model.embed.weight.dtype
        return wrapper.train(model.training)

    def _init_weights(self, module: nn.Module) -> None:
        """The models initialise themselves when they are built."""

    @classmethod
    def _finalize_model_loading(cls, model: Any, load_config: Any, loading_info: Any) -> Any:
        """Refuse weights that do not fit, which transformers would replace by random ones with a message."""
        where = load_config.pretrained_model_name_or_path
        for name, found, wanted in sorted(loading_info.mismatched_keys):
            raise ValueError(
                f"{where}: tensor {name!r} is of shape {tuple(found)}, the config asks for {tuple(wanted)}"
            )
        info = super()._finalize_model_loading(model, load_config, loading_info)
        for name in sorted(info.missing_keys):
            raise ValueError(f"{where}: tensor {name!r} is missing")
        for name in sorted(info.unexpected_keys):
            raise ValueError(f"{where}: tensor {name!r} is not part of this model")
        model._note_ties()
        return info

    def _note_ties(self) -> None:
        """Whether the output matrix is the embedding is a matter of the tensors; the configs follow them."""
        tied = is_tied(self.model)
        self.config.core = (self.config.core or {}) | {"tie_embeddings": tied}
        self.model.config = replace(self.model.config, tie_embeddings=tied)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers does; the config says whether the output matrix that is saved is the embedding."""
        self._note_ties()
        super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        plan_seed: int | Tensor | None = None,
        return_dict: bool | None = None,
        **unsupported: object,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the token after each position; with ``labels`` the loss (``read_with_loss``).

        Args:
            attention_mask: non-zero where a token is real, any pattern; with a cache, of all tokens of the stream.
            past_key_values: the stream that the tokens continue; it is advanced.
            use_cache: start a stream, or continue the given one; None does so if one is given.
            plan_seed: of a FreeTransformer, in place of the config's: one for all rows, or one per row.

        Raises: ValueError for whatever cannot be honoured (``inputs_embeds``, ``position_ids``,
            ``output_attentions``, ...), and as the model inside.
        """
        for name, value in unsupported.items():
            check(value is None or value is False, name, _short(value), "absent: it is not supported")
        if input_ids is None:
            raise ValueError("input_ids: wanted token ids, got None (inputs_embeds are not supported)")
        cache = self._cache(past_key_values, use_cache, labels)
        mask = _new_part(attention_mask, input_ids, cache)
        seeds = self._seeds(plan_seed, input_ids)
        if labels is None:
            loss, output = None, self._read(input_ids, mask, cache, seeds)
        else:
            check(plan_seed is None, "plan_seed", _short(plan_seed), "None with labels: the encoder plans")
            loss, output = read_with_loss(self.model, input_ids, mask, labels, self.config.objective or {})
        if cache is not None:
            assert output.state is not None
            real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
            cache.advance(output.state, real)
        result = CausalLMOutputWithPast(loss=loss, logits=output.logits, past_key_values=cache)
        return result if return_dict in (None, True) else result.to_tuple()

    def _read(
        self, tokens: Tensor, mask: Tensor | None, cache: StateCache | None, seeds: Tensor | None
    ) -> LMOutput:
        state = None
        if cache is not None:
            state = cache.state or self.model.init_state(len(tokens))
        if isinstance(self.model, FreeTransformer):
            assert seeds is not None and (state is None or isinstance(state, PlannedState))
            first = cache is not None and cache.state is None
            encoder = first and self.config.prompt_plan == "posterior"
            return read_planned(self.model, tokens, mask, state, seeds, encoder=encoder)
        if state is None:
            return self.model(tokens, attention_mask=mask)
        return self.model.step(tokens, state, attention_mask=mask)

    def _cache(
        self, given: StateCache | None, use_cache: bool | None, labels: Tensor | None
    ) -> StateCache | None:
        if given is not None:
            is_ours = isinstance(given, StateCache)
            check(is_ours, "past_key_values", type(given).__name__, "a helmholtz.interop.hf.StateCache")
            check(use_cache is not False, "use_cache", use_cache, "true with past_key_values")
        if given is None and not use_cache:
            return None
        check(labels is None, "labels", "a tensor", "None with a cache: a loss reads a text whole")
        return StateCache() if given is None else given

    def _seeds(self, plan_seed: int | Tensor | None, tokens: Tensor) -> Tensor | None:
        if self.config.plan_seed is None:
            wanted = f"None: a {self.config.architecture} has no plans"
            check(plan_seed is None, "plan_seed", _short(plan_seed), wanted)
            return None
        seed = self.config.plan_seed if plan_seed is None else plan_seed
        return seeds_of(seed, len(tokens), tokens.device)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give ``generate`` a cache of states where it would make one of keys and values."""
        kind, chunk = generation_config.cache_implementation, generation_config.prefill_chunk_size
        check(kind in (None, "dynamic"), "cache_implementation", kind, "None: the state is the only cache")
        if self.config.prompt_plan == "posterior":
            cached = "true with prompt_plan='posterior': the encoder reads the prompt once"
            check(bool(generation_config.use_cache), "use_cache", generation_config.use_cache, cached)
            check(chunk is None, "prefill_chunk_size", chunk, "None with prompt_plan='posterior'")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.model.unembed

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise ValueError("resize_token_embeddings: the vocabulary of a model is fixed")


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know these classes; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, HelmholtzConfig, exist_ok=True)
    AutoModelForCausalLM.register(HelmholtzConfig, HelmholtzForCausalLM, exist_ok=True)


def _new_part(mask: Tensor | None, tokens: Tensor, cache: StateCache | None) -> Tensor | None:
    """The mask of these tokens, from one of the whole stream. Raises: ValueError if it contradicts what was read."""
    past = 0 if cache is None else cache.get_seq_length()
    if mask is None or not past:
        return mask
    assert cache is not None and cache.mask is not None
    wanted = (len(tokens), past + tokens.shape[1])
    check(
        tuple(mask.shape) == wanted, "attention_mask", tuple(mask.shape), f"of shape {wanted}: the stream's"
    )
    same = torch.equal(mask[:, :past] != 0, cache.mask)
    check(same, "attention_mask", "another one", "the same as before for tokens that the cache has read")
    return mask[:, past:]


def _short(value: object) -> object:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
