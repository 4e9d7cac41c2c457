"""The option that names a checkpoint."""

import argparse


def add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    help = "a run (its best weights) or a checkpoint"
    parser.add_argument("--checkpoint", type=str, required=required, help=help)
