"""What ``labels`` ask for: the objectives of this library's trainer, with pads and labels that do not count."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helmholtz._checks import check, check_fraction
from helmholtz.interop.hf.inputs import Inputs
from helmholtz.layers.equilibrium_reading import start_distance
from helmholtz.layers.latent import Plan
from helmholtz.models.decoder import Decoder
from helmholtz.models.outputs import LMOutput, LMState, LowerOutput
from helmholtz.ops.binary_latent import bits_to_nats, kl_per_token
from helmholtz.ops.losses import cross_entropy

IGNORED = -100
LOSS = ("num_items_in_batch", "shift_labels", "label_smoothing")
WITHOUT_LABELS = (
    "the labels were taken out of the call (label smoothing or compute_loss_func of Trainer), so the loss lacks what "
    "{} weighs; helmholtz.interop.hf.HelmholtzTrainer smooths the whole objective"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a loss is of."""

    labels: Tensor
    """Integer ``B T``; label ``t`` is asked of the logits at ``t - 1``, and -100 is not asked."""
    are_shifted: bool = False
    """Whether label ``t`` is already that of the logits at ``t``."""
    n_items: Tensor | float | None = None
    """What sums are divided by; None: the labels that are asked here."""
    smoothing: float = 0.0
    """Probability that is spread evenly over the vocabulary."""
    objective: dict[str, Any] = field(default_factory=dict)
    """``HelmholtzConfig.objective``."""

    @classmethod
    def of(
        cls, labels: Tensor | None, others: dict[str, Any], objective: dict[str, Any], *, training: bool
    ) -> "Asked | None":
        """From transformers' arguments; None without labels.

        Args:
            others: what ``forward`` does not name, as Trainer takes every name with "label" for a column of the data.
                ``num_items_in_batch``, ``shift_labels`` and ``label_smoothing`` are taken out.
        """
        n_items, shifted, smoothing = (others.pop(name, None) for name in LOSS)
        given = labels if shifted is None else shifted
        if given is None:
            check(not smoothing, "label_smoothing", smoothing, "None without labels")
            if n_items is not None and training and objective:
                warnings.warn(WITHOUT_LABELS.format(", ".join(objective)), stacklevel=4)
            return None
        return cls(
            labels=given,
            are_shifted=shifted is not None,
            n_items=n_items,
            smoothing=smoothing or 0.0,
            objective=objective,
        )

    def targets(self, tokens: Tensor) -> Tensor:
        """Of the logits at each position; the last one has none. Raises: ValueError for another shape or dtype."""
        labels = self.labels
        check(labels.shape == tokens.shape, "labels", tuple(labels.shape), f"of shape {tuple(tokens.shape)}")
        check(labels.dtype in (torch.int32, torch.int64), "labels", labels.dtype, "int32 or int64")
        check_fraction("label_smoothing", self.smoothing)
        return labels.long() if self.are_shifted else F.pad(labels.long(), (0, 1), value=IGNORED)[:, 1:]


def read_with_loss(
    model: Decoder, inputs: Inputs, state: LMState | None, asked: Asked
) -> tuple[Tensor, LMOutput]:
    r"""Loss in nats per asked token, and the output it was read from.

    All terms are sums over tokens, divided by the ``N`` labels that are asked, or by ``n_items``: so an update from
    many small batches is the update from one large batch. In training the loss is

    * the cross-entropy :math:`-\frac1N \sum \log p`, with label smoothing as ``torch.nn.functional.cross_entropy``;
    * of a model with an equilibrium, plus ``convergence_weight`` :math:`/ N` times the sum of ``start_distance`` over
      real tokens;
    * of a model with a plan, under one drawn from the encoder (torch's global generator), plus
      :math:`\frac1N \sum_t \max(0, \mathrm{KL}_t - \kappa)` over the real tokens.

    In evaluation mode it is what the model says of the text: the cross-entropy, and of a model with a plan the negative
    ELBO, ``(CE total + KL total) / N``, an upper bound of its own cross-entropy from one draw. The logits of
    such a model are in both cases those under the encoder's plan, which has seen the tokens that are asked for.

    Args:
        state: the stream that the tokens continue.

    Raises: ValueError for labels of another shape or dtype, or outside the vocabulary.
    """
    targets = asked.targets(inputs.as_given(inputs.tokens))
    count = (targets != IGNORED).sum().clamp(min=1)
    output, extra = _read(model, inputs, state, asked.objective)
    nats = _cross_entropy(inputs.as_given(output.logits), targets, asked.smoothing)
    if asked.n_items is None:
        return nats + extra / count, output
    n_items = torch.as_tensor(asked.n_items, device=nats.device).clamp(min=1)
    return (nats * count + extra) / n_items, output


def _read(
    model: Decoder, inputs: Inputs, state: LMState | None, objective: dict[str, Any]
) -> tuple[LMOutput, Tensor | float]:
    """The output, and the sum of the objective's other terms."""
    plans: list[Plan] = []

    def posterior(half: LowerOutput) -> Plan:
        plans.append(model.sample_posterior(half))
        return plans[0]

    output = inputs.read(model, state, None if model.plan is None else posterior)
    extra: Tensor | float = 0.0
    if plans:
        assert plans[0].logits is not None
        kl = kl_per_token(plans[0].logits)  # that of a pad is 0, as its logits are
        extra = (F.relu(kl - bits_to_nats(objective["kappa_bits"])) if model.training else kl).sum()
    if model.equilibrium is not None and model.training and objective["convergence_weight"]:
        assert output.equilibrium is not None
        distance = start_distance(model.equilibrium, output.equilibrium)
        extra = extra + objective["convergence_weight"] * distance.sum()
    return output, extra


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    asked, size = targets[targets != IGNORED], logits.shape[-1]
    if asked.numel():
        low, high = int(asked.min()), int(asked.max())
        inside = low >= 0 and high < size
        check(inside, "labels", f"values from {low} to {high}", f"in [0, {size}), or {IGNORED}")
    if not smoothing:
        return cross_entropy(logits, targets)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(wide, targets.flatten(), label_smoothing=smoothing, reduction="sum")
    return total / asked.numel() if asked.numel() else total
