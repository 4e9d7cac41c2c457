"""A plan outside of a model: read from a text, edited, on disk."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz._checks import check, check_integer, check_keys
from helmholtz._files import write_json
from helmholtz._json import parse_json
from helmholtz.layers.placement import device_of
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder, require_plan
from helmholtz.ops.binary_latent import MAX_LATENT_BITS, kl_per_token

LISTS = {"codes": int, "tokens": int, "texts": str}
"""What a plan has one of per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """A code per token, the tokens it was read from, and the model to which it means something.

    Raises: ValueError naming the field that is wrong.
    """

    n_latent_bits: int
    codes: tuple[int, ...]
    tokens: tuple[int, ...]
    """Ids of the text that the codes were read from."""
    texts: tuple[str, ...]
    """What each of the tokens spells."""
    seed: int
    """Seed of the draw from the posterior."""
    fingerprint: str | None
    """Of the model (``model_fingerprint``); None fits every model with as many bits."""

    def __post_init__(self) -> None:
        check_integer("n_latent_bits", self.n_latent_bits)
        check(self.n_latent_bits <= MAX_LATENT_BITS, "n_latent_bits", self.n_latent_bits, "in 1..16")
        check(bool(self.codes), "codes", self.codes, "at least one code")
        for code in self.codes:
            _check_code("codes", code, self.n_latent_bits)
        for name in ("tokens", "texts"):
            length, wanted = len(getattr(self, name)), len(self.codes)
            check(length == wanted, name, f"{length} of them", f"as many as codes, {wanted}")
        for token in self.tokens:
            check_integer("tokens", token, minimum=0)
        check_integer("seed", self.seed, minimum=0)

    def _repr_html_(self) -> str:
        from helmholtz._notebook.plan import codes_html

        return codes_html(self.codes, self.n_latent_bits, self.texts)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write JSON, atomically."""
        write_json(file, asdict(self))


def load_plan(file: str | os.PathLike[str], model: Decoder) -> PlanFile:
    """The plan in ``file``, checked against the model that is to use it.

    Raises: ValueError naming the file if it is missing, not a plan, or of a model with other bits or other weights.
    """
    try:
        content = parse_json(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    try:
        plan = _parse(content)
        bits, fingerprint = require_plan(model).n_bits, model_fingerprint(model)
        check(plan.n_latent_bits == bits, "n_latent_bits", plan.n_latent_bits, f"{bits} as the model's")
        wanted = (
            f"{fingerprint!r}, that of the model (codes of other weights mean something else; null fits all)"
        )
        check(plan.fingerprint in (None, fingerprint), "fingerprint", plan.fingerprint, wanted)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return plan


def _parse(content: Any) -> PlanFile:
    if not isinstance(content, dict):
        raise ValueError(f"wanted a plan, a mapping of names to values, got {type(content).__name__}")
    names = [field.name for field in fields(PlanFile)]
    check_keys("a plan", content, names)
    for name in names:
        if name not in content:
            raise ValueError(f"a plan needs the key {name!r}")
    for name, kind in LISTS.items():
        value = content[name]
        fits = isinstance(value, list) and all(type(item) is kind for item in value)
        check(fits, name, value, f"a list of {'integers' if kind is int else 'strings'}")
    check_integer("n_latent_bits", content["n_latent_bits"], minimum=0)
    fits = content["fingerprint"] is None or isinstance(content["fingerprint"], str)
    check(fits, "fingerprint", content["fingerprint"], "a string or null")
    return PlanFile(**content | {name: tuple(content[name]) for name in LISTS})


def model_fingerprint(model: Decoder) -> str:
    """16 hexadecimal digits of the SHA-256 of config and weights: the same wherever the same model is loaded."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """A plan drawn for a text by the encoder, and how sure of each bit the encoder was."""

    codes: tuple[int, ...]
    probability: Float[Tensor, "T H"]
    """Posterior probability that a bit is 1."""
    kl: Float[Tensor, " T"]
    """Of the posterior from the prior, in nats per token: what the code could hold of the text at most."""

    def _repr_html_(self) -> str:
        from helmholtz._notebook.plan import encoder_html

        return encoder_html(self.probability.tolist(), self.kl.tolist())


def read_plan(model: Decoder, tokens: Sequence[int], *, seed: int = 0) -> ReadPlan:
    """The encoder's plan of a text, drawn from the posterior; position ``t`` has the same code distribution as in a
    prompt of these tokens.

    Raises: ValueError as ``FreeTransformer.encode``.
    """
    device = device_of(model)
    with evaluation_mode(model):
        generator = torch.Generator(device).manual_seed(seed)
        plan = model.encode(torch.tensor([list(tokens)], device=device), generator=generator)
    assert plan.logits is not None
    logits = plan.logits[0].float().cpu()
    return ReadPlan(tuple(plan.code[0].tolist()), logits.sigmoid(), kl_per_token(logits))


@dataclass(frozen=True, slots=True)
class Edit:
    """One bit of the code at a position, or with ``bit`` None the whole code, set to ``value``."""

    position: int
    bit: int | None
    value: int


def edit_codes(codes: Sequence[int], edits: Iterable[Edit], n_latent_bits: int) -> tuple[int, ...]:
    """The codes after the edits, in their order.

    Raises: ValueError for a position, bit or value that is not there.
    """
    edited = list(codes)
    for edit in edits:
        check(0 <= edit.position < len(edited), "position", edit.position, f"in [0, {len(edited)}), the plan")
        if edit.bit is None:
            _check_code("code", edit.value, n_latent_bits)
            edited[edit.position] = edit.value
        else:
            check(0 <= edit.bit < n_latent_bits, "bit", edit.bit, f"in [0, {n_latent_bits})")
            check(edit.value in (0, 1), f"value of bit {edit.bit}", edit.value, "0 or 1")
            edited[edit.position] = set_bit(edited[edit.position], edit.bit, edit.value)
    return tuple(edited)


def set_bit(code: int, bit: int, value: int) -> int:
    """``code`` with one bit set to 0 or 1."""
    return code | (1 << bit) if value else code & ~(1 << bit)


def _check_code(name: str, code: int, n_latent_bits: int) -> None:
    check(0 <= code < 2**n_latent_bits, name, code, f"in [0, {2**n_latent_bits})")
