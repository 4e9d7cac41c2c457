"""The models in EleutherAI's lm-evaluation-harness, as its model type ``helmholtz``; importing registers it.

The type ``hf`` works on an exported folder too. This one takes runs and checkpoints as well, reads text in the windows
of ``helmholtz evaluate``, and gives a Free Transformer, whose likelihood is a sum over plans, bounds in place of the
likelihood under one plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  its own types come first: it adds none to a registry that holds one
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor

from helmholtz._checks import check, check_choice, check_integer
from helmholtz._run_folder import TOKENIZER
from helmholtz.data.tokenizer import load_tokenizer
from helmholtz.evals.language import check_window, stream_nats
from helmholtz.evals.latent import PRIOR_DRAWS, evaluate_bounds
from helmholtz.evals.runs import find_checkpoint
from helmholtz.interop.hf.export import from_hf
from helmholtz.interop.hf.generation_kwargs import fit_windows, read_generation_kwargs
from helmholtz.interop.hf.plans import seeded_plan
from helmholtz.models.base import evaluation_mode
from helmholtz.models.checkpoint import MODEL_TYPE, load_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.generation import generate

BOUNDS = ("mixture_weighted", "importance_weighted", "elbo", "prior_cross_entropy")
EXACT = "log-likelihood"


@dataclass(frozen=True, slots=True)
class TextIds:
    """Text to ids and back, whichever library's tokenizer does it."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int


@register_model("helmholtz")
class HelmholtzLM(TemplateLM):
    """A run (its best weights), a checkpoint or an exported folder.

    ``loglikelihood_rolling`` is minus ``stream_nats`` of the end token and the text, with windows of ``max_length``; of
    a FreeTransformer minus a bound of ``evaluate_bounds``: at most the model's own log-likelihood, so that perplexities
    and bits per byte are upper bounds. ``loglikelihood`` of a continuation is exact; of a FreeTransformer it is the
    difference of two such bounds, of context with continuation and of the context alone: an estimate that is no
    bound unless the context is one token, but that ranks continuations of one context as the bounds do. What a result
    is stands under ``score`` in its ``config``.

    Args:
        pretrained: the folder.
        max_length: window; None means the model's longest.
        overlap: tokens of a window that are context only; 0 as in ``helmholtz compare``.
        bound: of a model with a plan, a field of ``LatentBounds``.
        n_samples: of a model with a plan, plans per window.
        seed: of plans and of sampled text.

    Raises: ValueError for a folder that is none of these, or an option that its model does not have.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str = "cpu",
        max_length: int | None = None,
        overlap: int = 0,
        bound: str | None = None,
        n_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.text = _load(pretrained, device)
        self._device = torch.device(device)
        check(max_batch_size is None, "max_batch_size", max_batch_size, "None: batches are not searched for")
        check(str(batch_size).isdecimal(), "batch_size", batch_size, "a number: batches are not searched for")
        self.batch_size = int(batch_size)
        self.max_length = self.model.config.max_seq_len if max_length is None else max_length
        check_window(self.model, self.max_length)
        self.overlap, self.seed = overlap, seed
        self._choose_bound(bound, n_samples)

    def _choose_bound(self, bound: str | None, n_samples: int | None) -> None:
        if self.model.plan is not None:
            self.bound = BOUNDS[0] if bound is None else bound
            self.n_samples = 16 if n_samples is None else n_samples
            check_choice("bound", self.bound, BOUNDS)
            check_integer("n_samples", self.n_samples)
            check(self.overlap == 0, "overlap", self.overlap, "0: a window has a plan of its own")
            return
        for name, value in (("bound", bound), ("n_samples", n_samples)):
            check(value is None, name, value, "None: this model has no plan, its numbers are exact")

    def get_model_info(self) -> dict[str, Any]:
        """What the scores are; lm_eval puts it into the results."""
        info = {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "max_length": self.max_length,
            "overlap": self.overlap,
            "score": EXACT,
        }
        if self.model.plan is not None:
            info["score"] = (
                f"lower bound of the log-likelihood ({self.bound}, {self.n_samples} plans of the posterior and "
                f"{PRIOR_DRAWS} of the prior per window): perplexities and bits per byte are upper bounds; of a "
                "continuation the difference of two bounds, an estimate"
            )
        return info

    @property
    def eot_token_id(self) -> int:
        return self.text.end

    @property
    def tokenizer_name(self) -> str:
        return f"{MODEL_TYPE}-{self.model.config.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (string,) in (request.args for request in requests):
            stream = torch.tensor([self.text.end, *self.text.encode(string)])
            totals.append(-self._nats(stream))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def _nats(self, stream: Tensor) -> float:
        """Of all tokens but the first; of a model with a plan a bound."""
        if len(stream) < 2:
            return 0.0
        if self.model.plan is None:
            sizes = {"seq_len": self.max_length, "overlap": self.overlap, "batch_size": self.batch_size}
            return stream_nats(self.model, stream, **sizes)
        bounds = evaluate_bounds(
            self.model,
            stream,
            seq_len=self.max_length,
            batch_size=self.batch_size,
            n_samples=self.n_samples,
            seed=self.seed,
        )
        nats: float = getattr(bounds, self.bound)
        return nats * bounds.n_tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of a continuation without text it is 0, and that is what greedy decoding gives."""
        asked = [request for request in requests if request.args[1]]
        scores = iter(super().loglikelihood(asked, disable_tqdm=disable_tqdm))
        return [next(scores) if request.args[1] else (0.0, True) for request in requests]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """One after the other where the two together have no more tokens than the context alone."""
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair if pair[1] else (self.text.encode(context), self.text.encode(continuation))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        with evaluation_mode(self.model):
            for first in range(0, len(requests), self.batch_size):
                batch = [
                    self._fitted(context, text)
                    for _, context, text in requests[first : first + self.batch_size]
                ]
                results += self._scores(batch)
        for (pair, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """The last tokens that the model can take, and how many of them are asked for."""
        longest = self.max_length
        wanted = f"at most max_length = {longest}"
        check(len(continuation) <= longest, "a continuation's tokens", len(continuation), wanted)
        return (context + continuation)[-(longest + 1) :], len(continuation)

    def _scores(self, batch: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        longest = max(len(tokens) for tokens, _ in batch)
        padded = torch.tensor(
            [tokens + [0] * (longest - len(tokens)) for tokens, _ in batch], device=self._device
        )
        lengths = torch.tensor([[len(tokens)] for tokens, _ in batch], device=self._device)
        mask = torch.arange(1, longest, device=self._device) < lengths
        log_p = self._logits(padded[:, :-1], None if bool(mask.all()) else mask).float().log_softmax(-1)
        results = []
        for row, (tokens, n_asked) in enumerate(batch):
            asked = slice(len(tokens) - 1 - n_asked, len(tokens) - 1)
            targets = torch.tensor(tokens[-n_asked:], device=self._device)
            greedy = bool((log_p[row, asked].argmax(-1) == targets).all())
            total = -F.nll_loss(log_p[row, asked].double(), targets, reduction="sum").item()
            if self.model.plan is not None:
                stream = torch.tensor(tokens)
                total = self._nats(stream[: len(tokens) - n_asked]) - self._nats(stream)
            results.append((total, greedy))
        return results

    def _logits(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Of a model with a plan under the plan that the seed draws from the prior: what greedy decoding would see."""
        plan = None
        if self.model.plan is not None:
            plan = seeded_plan(self.model, torch.tensor([self.seed], device=self._device))
        return self.model(tokens, attention_mask=mask, z=plan).logits

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations as ``read_generation_kwargs`` reads the options, in the window as ``fit_windows`` says."""
        asked = [request.args for request in requests]
        read = [read_generation_kwargs(options, end=self.text.end, seed=self.seed) for _, options in asked]
        prompts = [[self.text.end, *self.text.encode(context)] for context, _ in asked]
        wanted = [settings.max_new_tokens for settings, _ in read]
        fitted = fit_windows(prompts, wanted, self.max_length)
        texts = []
        for request, (settings, until), (prompt, room) in zip(asked, read, fitted, strict=True):
            (tokens,) = generate(self.model, [prompt], replace(settings, max_new_tokens=room))
            texts.append(postprocess_generated_text(self.text.decode(tokens), until, None))
            self.cache_hook.add_partial("generate_until", request, texts[-1])
        return texts


def _load(folder: str, device: str) -> tuple[Decoder, TextIds]:
    if _is_exported(Path(folder)):
        from transformers import AutoTokenizer

        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = TextIds(
            lambda text: fast.encode(text, add_special_tokens=False),
            lambda tokens: fast.decode(tokens, skip_special_tokens=True),
            fast.eos_token_id,
        )
        return from_hf(folder, device), ids
    checkpoint = find_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    return load_checkpoint(checkpoint, device), TextIds(tokenizer.encode, tokenizer.decode, tokenizer.eos_id)


def _is_exported(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").exists()
