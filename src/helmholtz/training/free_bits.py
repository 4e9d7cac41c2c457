"""Training of models with a plan: cross-entropy under the posterior's plan, and what the plan costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz._checks import check, check_integer, check_non_negative, check_positive
from helmholtz.layers.latent import Plan
from helmholtz.models.decoder import Decoder, require_plan
from helmholtz.models.outputs import LMLoss, LowerOutput
from helmholtz.ops.binary_latent import bits_to_nats, code_log_probability, free_bits, kl_per_token
from helmholtz.ops.code_usage import CodeUsage, code_usage
from helmholtz.ops.losses import cross_entropy
from helmholtz.training.objectives import Objective, Report

COLLAPSED = 0.05
"""Fraction of ``kappa`` below which the plan's mutual information with its token counts as none."""
REMEDIES = "objective.kappa_start_bits, objective.kl_warmup_steps or objective.encoder_lr_factor may help"


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeBitsConfig:
    """The KL term of a Free Transformer's loss. All settings but the first help against a plan that stays unused."""

    kappa_bits: float = 0.5
    """Free bits: KL per token, in bits, up to which the loss has no penalty."""
    kappa_start_bits: float | None = None
    """Free bits at the first step; they change linearly to kappa_bits over kappa_steps. None: kappa_bits throughout."""
    kappa_steps: int = 0
    """Optimizer steps over which kappa_start_bits changes to kappa_bits."""
    kl_warmup_steps: int = 0
    """Optimizer steps over which the weight of the KL term rises linearly from 0 to 1."""
    encoder_lr_factor: float = 1.0
    """Learning rate of the encoder, as a multiple of lr."""

    def __post_init__(self) -> None:
        check_non_negative("objective.kappa_bits", self.kappa_bits)
        check_integer("objective.kappa_steps", self.kappa_steps, minimum=0)
        check_integer("objective.kl_warmup_steps", self.kl_warmup_steps, minimum=0)
        check_positive("objective.encoder_lr_factor", self.encoder_lr_factor)
        if self.kappa_start_bits is not None:
            check_non_negative("objective.kappa_start_bits", self.kappa_start_bits)
        scheduled = self.kappa_start_bits is not None
        wanted = (
            "above 0 with objective.kappa_start_bits" if scheduled else "0 without objective.kappa_start_bits"
        )
        check((self.kappa_steps > 0) == scheduled, "objective.kappa_steps", self.kappa_steps, wanted)

    def kappa(self, step: int) -> float:
        """Nats per token that are free after ``step`` optimizer steps."""
        if self.kappa_start_bits is None:
            return bits_to_nats(self.kappa_bits)
        share = min(1.0, step / self.kappa_steps)
        return bits_to_nats(self.kappa_start_bits + share * (self.kappa_bits - self.kappa_start_bits))

    def weight(self, step: int) -> float:
        """Weight of the charge after ``step`` optimizer steps."""
        return min(1.0, step / self.kl_warmup_steps) if self.kl_warmup_steps else 1.0


class FreeBitsObjective:
    r"""Cross-entropy under a plan drawn from the posterior, and a charge for what the plan carries above ``kappa``.

    .. math:: \ell = -\frac1T \sum_t \ln p(x_{t+1} | x_{\le t}, z)
              + \frac wT \sum_t \max(0, \mathrm{KL}_t - \kappa), \quad z \sim q(\cdot | x_{1..T})

    The terms are ``reconstruction`` (the first sum: the plan has seen the tokens asked for, so it leaks), ``free_bits``
    (the second, without its weight) and ``kl`` (the mean of the raw KL). The bound is, in training,
    ``reconstruction + kl``: the negative ELBO, one draw. In evaluation it weighs that plan and one of the prior
    together,

    .. math:: -\frac1T \ln \sum_{z \in \{z_q, z_p\}} \frac{p(x | z)\, p(z)}{q(z | x) + p(z)}

    per window: also a bound, but one that a KL which says nothing of the text does not loosen. Free bits let it drift.

    Args:
        seed: of the plans from the prior in reports.

    Source: Fleuret, "The Free Transformer", 2025, eq. 4-5.
    """

    def __init__(self, config: FreeBitsConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    def __call__(self, model: nn.Module, tokens: Int[Tensor, "B T1"], step: int) -> Objective:
        return self.read(model, tokens, step)[0]

    def read(self, model: nn.Module, tokens: Int[Tensor, "B T1"], step: int) -> tuple[Objective, LMLoss]:
        """The objective, and the model's output under the plan that it is of."""
        model = _planned(model)
        found: list[tuple[LowerOutput, Plan]] = []

        def posterior(half: LowerOutput) -> Plan:
            found.append((half, model.sample_posterior(half)))
            return found[0][1]

        output = model(tokens[:, :-1], z=posterior, targets=tokens[:, 1:])
        half, z = found[0]
        reconstruction = output.nats
        kl = kl_per_token(_logits(z))
        charge = free_bits(kl, self.config.kappa(step))
        terms = {"reconstruction": reconstruction, "free_bits": charge, "kl": kl.mean()}
        terms = {name: term.detach() for name, term in terms.items()}
        loss = reconstruction + self.config.weight(step) * charge
        elbo = terms["reconstruction"] + terms["kl"]
        bound = elbo if model.training else _mixture(model, half, z, tokens[:, 1:])
        return Objective(loss, terms, bound), output

    def report(self, model: nn.Module, batches: Sequence[Int[Tensor, "_ _"]], step: int) -> Report:
        """Cross-entropy under plans of the posterior (it leaks) and under one of the prior each, and the plan's usage.

        The plans of the prior are the same at every evaluation.
        """
        model = _planned(model)
        generator = torch.Generator().manual_seed(self.seed)
        sums, plans = {"posterior_cross_entropy_leaking": 0.0, "prior_cross_entropy": 0.0}, list[Plan]()
        for tokens in batches:
            half, targets = model.lower(tokens[:, :-1]), tokens[:, 1:]
            plans.append(model.sample_posterior(half))
            prior = model.sample_prior(*targets.shape, generator=generator)
            for name, z in zip(sums, (plans[-1], prior), strict=True):
                sums[name] += len(tokens) * cross_entropy(model.upper(half, z).logits, targets).item()
        n_windows = sum(len(tokens) for tokens in batches)
        means = {name: total / n_windows for name, total in sums.items()}
        return self._usage(
            torch.cat([_logits(z) for z in plans]), torch.cat([z.code for z in plans]), step, means
        )

    def _usage(
        self, logits: Float[Tensor, "N T H"], code: Int[Tensor, "N T"], step: int, means: dict[str, float]
    ) -> Report:
        usage, kappa = code_usage(logits, code), self.config.kappa(step)
        statistics = means | {
            "kl": usage.kl,
            "free_bits": free_bits(kl_per_token(logits), kappa).item(),
            "kappa": kappa,
            "free_bits_weight": self.config.weight(step),
            "active_bits": float(usage.active_bits),
            "codes_used": float(usage.codes_used),
            "code_perplexity": usage.perplexity,
            "mutual_information": usage.mutual_information,
        }
        statistics |= {f"kl_bit_{bit}": kl for bit, kl in enumerate(usage.kl_per_bit)}
        return Report(statistics, self._warnings(usage, step))

    def _warnings(self, usage: CodeUsage, step: int) -> dict[str, str]:
        c, kappa = self.config, self.config.kappa(step)
        settled = step >= max(c.kappa_steps, c.kl_warmup_steps)
        # the KL alone does not show it: what is free may be spent on one distribution for all tokens
        if not settled or usage.mutual_information >= COLLAPSED * kappa:
            return {}
        says, kl, free = (x / math.log(2) for x in (max(0.0, usage.mutual_information), usage.kl, kappa))
        text = f"the plan says {says:.2g} bits about its token (KL {kl:.2g}, free {free:.3g}); {REMEDIES}"
        return {"collapsed": text}


def _mixture(model: Decoder, half: LowerOutput, z: Plan, targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Nats per token; as ``evals.latent``'s mixture with a plan of either kind per window."""
    logits, prior = _logits(z).double(), model.sample_prior(*targets.shape)
    log_prior = -bits_to_nats(targets.shape[1] * logits.shape[-1])
    log_terms = []
    for plan in (z, prior):
        nats = F.cross_entropy(
            model.upper(half, plan).logits.float().transpose(1, 2), targets, reduction="none"
        )
        log_ratio = code_log_probability(plan.code, logits).sum(1) - log_prior
        log_terms.append(-nats.double().sum(1) - F.softplus(log_ratio))
    return (-torch.stack(log_terms).logsumexp(0).mean() / targets.shape[1]).float()


def _planned(model: nn.Module) -> Decoder:
    require_plan(model)
    assert isinstance(model, Decoder)
    return model


def _logits(z: Plan) -> Float[Tensor, "B T H"]:
    assert z.logits is not None
    return z.logits
