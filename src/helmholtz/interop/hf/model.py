"""Every model of ``MODELS`` as a model of transformers: ``generate``, ``Trainer``, ``save_pretrained``, Auto."""

import contextlib
import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from helmholtz._checks import check
from helmholtz.interop.hf.cache import StateCache
from helmholtz.interop.hf.checkpointing import Checkpoint, blocks_of, checkpointed, other_switches
from helmholtz.interop.hf.config import HelmholtzConfig
from helmholtz.interop.hf.inputs import Inputs, check_arguments
from helmholtz.interop.hf.losses import Asked, read_with_loss
from helmholtz.interop.hf.plans import plan_seeds, seeded_plan
from helmholtz.interop.hf.taps import is_flat, keeper, tapped
from helmholtz.layers.init import init_normal, initializer_range
from helmholtz.layers.placement import dtype_of
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import MODEL_TYPE
from helmholtz.models.decoder import Decoder, PlanOf
from helmholtz.models.outputs import LMState
from helmholtz.models.tied import is_tied

EMBED, UNEMBED = "model.embed.weight", "model.unembed.weight"


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
    _input_embed_layer = "embed"
    accepts_loss_kwargs = True  # Trainer then tells how many labels the whole step asks for
    supports_gradient_checkpointing = True
    gradient_checkpointing = False  # set by transformers
    _supports_sdpa = True  # what plain attention runs through
    _no_split_modules = ["Block", "LatentEncoder", "EquilibriumLayer"]
    _is_stateful = True  # a recurrent state cannot be cut back: transformers then refuses assisted decoding
    _tied_weights_keys = {UNEMBED: EMBED}

    def __init__(self, config: HelmholtzConfig) -> None:
        super().__init__(config)
        self.model: Decoder = MODELS[config.architecture](config.core_config())
        self.post_init()

    @classmethod
    def of(cls, model: Decoder) -> "HelmholtzForCausalLM":
        """``model`` itself in the interface of transformers, in the mode it is in; nothing is copied.

        Raises: ValueError for a model that is none of ``MODELS``.
        """
        names = [name for name, kind in MODELS.items() if kind is type(model)]
        check(bool(names), "model", type(model).__name__, f"one of the architectures {sorted(MODELS)}")
        with torch.device("meta"):
            wrapper = cls(HelmholtzConfig.of(names[0], model.config))
        wrapper.model = model
        wrapper._note_ties()
        wrapper.config.dtype = dtype_of(model)
        return wrapper.train(model.training)

    def initialize_weights(self) -> None:
        """The models initialise themselves when they are built."""

    def _init_weights(self, module: nn.Module) -> None:
        """The rows that ``resize_token_embeddings`` adds."""
        with initializer_range(self.config.initializer_range):
            init_normal(module)

    @classmethod
    def _finalize_model_loading(cls, model: Any, load_config: Any, loading_info: Any) -> Any:
        """Refuse weights that do not fit, which transformers would replace by random ones with a message.

        What is tied is said by the weights where they contradict the config: an output matrix that is asked for and was
        not saved starts as the embedding, and one that was saved and differs from the embedding is kept.
        """
        where = load_config.pretrained_model_name_or_path
        for name, found, wanted in sorted(loading_info.mismatched_keys):
            raise ValueError(
                f"{where}: tensor {name!r} is of shape {tuple(found)}, the config asks for {tuple(wanted)}"
            )
        if UNEMBED in (missing := loading_info.missing_keys) and EMBED not in missing:
            model.model.unembed.weight = nn.Parameter(model.model.embed.weight.detach().clone())
            if not model.config.tie_word_embeddings:
                missing.remove(UNEMBED)
        info = super()._finalize_model_loading(model, load_config, loading_info)
        for name in sorted(info.missing_keys):
            raise ValueError(f"{where}: tensor {name!r} is missing")
        for name in sorted(info.unexpected_keys):
            raise ValueError(f"{where}: tensor {name!r} is not part of this model")
        model._note_ties()
        return info

    def _note_ties(self) -> None:
        """Whether the output matrix is the embedding is a matter of the tensors; the configs follow them."""
        self._configure(tie_word_embeddings=is_tied(self.model))

    def _configure(self, **sizes: Any) -> None:
        """Change sizes in both configs, by transformers' names."""
        for name, value in sizes.items():
            setattr(self.config, name, value)
        self.model.config = self.config.core_config()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers does; the config says whether the output matrix that is saved is the embedding."""
        self._note_ties()
        super().save_pretrained(save_directory, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        plan_seed: int | Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each position; with ``labels`` the loss (``read_with_loss``).

        Args:
            attention_mask: non-zero where a token is real, any pattern; with a cache, of all tokens of the stream.
            position_ids: consecutive within a sequence; without mask and cache, another sequence starts where they
                are not.
            past_key_values: the stream that the tokens continue; it is advanced.
            inputs_embeds: vectors in place of the tokens' embeddings.
            use_cache: start a stream, or continue the given one. None means ``config.use_cache`` in evaluation mode and
                no in training; a stream that nobody asked for reads the tokens once it is continued.
            output_hidden_states: give what enters each block, and what leaves the last norm.
            logits_to_keep: how many logits at the end, 0 for all, or a tensor of their positions.
            plan_seed: of a model with a plan, in place of the config's: one for all rows, or one per row.
            cu_seq_lens_q: bounds of sequences packed in one row, as ``cu_seq_lens_k`` or the index ``seq_idx``.
            others: of a loss, ``num_items_in_batch``, ``shift_labels`` and ``label_smoothing``.

        Raises: ValueError for what cannot be honoured (``output_attentions``, ...), and as the model inside.
        """
        asked = Asked.of(labels, others, self.config.objective or {}, training=self.training)
        check_arguments(others, inspect.signature(self.forward).parameters)
        cache = self._cache(past_key_values, use_cache)
        inputs = Inputs.of(
            input_ids,
            inputs_embeds,
            mask=attention_mask,
            position_ids=position_ids,
            bounds=cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q,
            seq_idx=seq_idx,
            past=None if cache is None else cache.mask,
            pad=self._foreign_pad(),
        )
        if inputs.cu_seqlens is not None:
            check(not use_cache, "use_cache", use_cache, "false where sequences are packed")
            cache = None
        seeds = plan_seeds(self.config, plan_seed, inputs.tokens, with_loss=asked is not None)
        later = past_key_values is None and (use_cache is None or asked is not None)
        state = None if cache is None or later else cache.state or self._start(inputs, cache)
        first = cache is not None and not later and cache.state is None
        keep = None if asked else keeper(logits_to_keep, inputs.as_given)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        loss = None
        taps = tapped(self.model, embeds=inputs.embeds, keep=keep, hidden=bool(hidden))
        with self._checkpointed(), taps as found:
            if asked is None:
                output = inputs.read(self.model, state, self._plan(seeds, first=first))
            else:
                loss, output = read_with_loss(self.model, inputs, state, asked)
        if cache is not None and later:
            cache.defer(lambda: self._stream(inputs, cache, seeds), inputs.real())
        elif cache is not None:
            assert output.state is not None
            cache.advance(output.state, inputs.real())
        logits = (
            output.logits if keep else slice_logits_to_keep(inputs.as_given(output.logits), logits_to_keep)
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits.squeeze(0) if is_flat(logits_to_keep) and keep else logits,
            past_key_values=cache,
            hidden_states=tuple(map(inputs.as_given, found)) if hidden else None,
        )

    def _foreign_pad(self) -> int | None:
        """The id of pads if it is outside the vocabulary, so that no other token has it."""
        for config in (self.config, self.generation_config):
            pad = getattr(config, "pad_token_id", None)
            if isinstance(pad, int) and pad >= self.config.vocab_size:
                return pad
        return None

    def _plan(self, seeds: Tensor | None, *, first: bool) -> PlanOf | None:
        """The plan of tokens that nobody asks a loss of; the first ones of a stream may be the encoder's."""
        if seeds is None:
            return None
        return seeded_plan(self.model, seeds, encoder=first and self.config.prompt_plan == "posterior")

    def _start(self, inputs: Inputs, cache: StateCache) -> LMState:
        layer = cache.layer
        return self.model.init_state(len(inputs.tokens), length=layer.length, encode_again=layer.encode_again)

    def _stream(self, inputs: Inputs, cache: StateCache, seeds: Tensor | None) -> LMState:
        """The state after tokens that were read without one."""
        with tapped(self.model, embeds=inputs.embeds, keep=lambda x: x[:, -1:], hidden=False):
            output = inputs.read(self.model, self._start(inputs, cache), self._plan(seeds, first=False))
        assert output.state is not None
        return output.state

    def _cache(self, given: StateCache | None, use_cache: bool | None) -> StateCache | None:
        if given is None:
            # in training nobody continues, and what a replica of DataParallel returns is gathered, which no cache is
            default = self.config.use_cache and not (self.training or getattr(self, "_is_replica", False))
            return StateCache() if (default if use_cache is None else use_cache) else None
        is_ours = isinstance(given, StateCache)
        check(is_ours, "past_key_values", type(given).__name__, "a helmholtz.interop.hf.StateCache")
        return given

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
            longest = self.model.config.max_seq_len  # a generation may be told to end by time alone
            model_kwargs["past_key_values"] = StateCache(
                max(1, min(max_cache_length, longest)), encode_again=False
            )

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Checkpoint = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        self.gradient_checkpointing, self._checkpoint = enable, gradient_checkpointing_func
        self._checkpoint_every = every_n_layers
        for module in other_switches(self.model):
            module.gradient_checkpointing = enable  # type: ignore[assignment]

    def _checkpointed(self) -> contextlib.AbstractContextManager[None]:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return contextlib.nullcontext()
        return checkpointed(blocks_of(self.model, self._checkpoint_every), self._checkpoint)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding; the vocabulary is then that of the new one."""
        super().set_input_embeddings(value)
        self._configure(vocab_size=getattr(value, "num_embeddings", self.config.vocab_size))

    def get_output_embeddings(self) -> nn.Module:
        return self.model.unembed

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output matrix; ``tie_weights`` ties it again if the config says so."""
        self.model.unembed = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As every model of transformers: more ids at the end, or fewer; the config of the model inside follows."""
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self._configure(vocab_size=embedding.num_embeddings)
        return embedding


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know these classes; calling it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, HelmholtzConfig, exist_ok=True)
    AutoModelForCausalLM.register(HelmholtzConfig, HelmholtzForCausalLM, exist_ok=True)


# where Trainer looks whether label smoothing has to shift the labels, and pipelines whether they know the class
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MODEL_TYPE, HelmholtzForCausalLM.__name__)
