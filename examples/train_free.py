"""Train a Free Transformer.

    python examples/train_free.py --config configs/free_transformer.yaml --output-dir checkpoints/free

As ``train_baseline.py``, which see.
"""

import sys

from train_baseline import train

if __name__ == "__main__":
    sys.exit(train("free_transformer", "checkpoints/free"))
