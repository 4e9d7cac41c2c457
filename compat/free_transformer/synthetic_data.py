"""The original ``free_transformer.synthetic_data``."""

from helmholtz.interop.seeds.free_transformer.synthetic_data import (
    SyntheticDataGenerator,
    SyntheticDataset,
    create_dataloaders,
)

__all__ = ["SyntheticDataGenerator", "SyntheticDataset", "create_dataloaders"]
