#!/usr/bin/env bash
# The comparison of `make generate-data-small train-baseline train-free compare`, inside an image.
set -euo pipefail
cd "$(dirname "$0")/.."

python examples/generate_data.py --output-dir data/synthetic --overwrite \
  --vocab-size 1000 --seq-length 128 --num-train 2000 --num-val 200
python examples/train_baseline.py --config configs/baseline.yaml --output-dir checkpoints/baseline
python examples/train_free.py --config configs/free_transformer.yaml --output-dir checkpoints/free
python examples/eval_compare.py --baseline-checkpoint checkpoints/baseline \
  --free-checkpoint checkpoints/free --data-dir data/synthetic --output-dir results/comparison
