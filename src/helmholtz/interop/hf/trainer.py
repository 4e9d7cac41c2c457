"""Trainer of transformers with this library's weight decay and the whole objective under label smoothing."""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from helmholtz.training.optim import is_decayed


class HelmholtzTrainer(Trainer):
    """``transformers.Trainer`` with two differences, for models of this library and those that read free energies.

    * Weight decay acts on the parameters that this library's trainer decays, weight matrices. ``Trainer`` decides by
      name and also decays ``A_log``, ``D``, temperatures, queries and memory patterns, for which 0 is no neutral value.
    * ``label_smoothing_factor`` smooths the labels within the model's own loss. ``Trainer`` takes the labels out of the
      call, so that a Free Transformer's encoder is not trained and equilibria have no term for their start.
    """

    label_smoother: Any

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if is_decayed(name, parameter)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        smoother = self.label_smoother
        if smoother is None or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.label_smoother = None
        try:
            smoothed = inputs | {"label_smoothing": smoother.epsilon}
            return super().compute_loss(model, smoothed, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother
