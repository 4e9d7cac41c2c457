"""The decoder without a plan, in the original names."""

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import check
from helmholtz.interop.seeds.free_transformer.config import ModelConfig
from helmholtz.models.transformer import Transformer


class TransformerBaseline(nn.Module):
    """``helmholtz.models.Transformer`` built from the original config; the model itself is ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check(isinstance(config, ModelConfig), "config", config, f"a {ModelConfig.__module__} config")
        self.config = config
        self.model = Transformer(config.to_baseline())

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "B T vocab"]:
        """Logits of the next tokens."""
        return self.model(tokens).logits
