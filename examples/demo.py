"""The demo: each system in the setting that it is for, in a few minutes, on one page.

    python examples/demo.py                # under five minutes on 2 cores; interrupted, it goes on where it was
    python examples/demo.py --seed 1       # the same with another seed

Language models of equal size on Shakespeare, channel-wise selection, a decoder that plans, and an associative memory.
Everything is in results/demo, and with a seed other than 0 in results/demo-seed<n>; the page is index.html there.
``demo_full.py`` compares seven language models.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from helmholtz.experiments.demo.language import DemoError
from helmholtz.experiments.demo.run import run_demo
from helmholtz.experiments.demo.settings import DemoSettings

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Four things that helmholtz does, computed and put on one page."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="compute everything anew")
    values = parser.parse_args()
    os.chdir(ROOT)
    console = Console(highlight=False)
    folder = Path(f"results/demo-seed{values.seed}" if values.seed else "results/demo")
    try:
        page = run_demo(DemoSettings(seed=values.seed), folder, console, fresh=values.fresh)
    except DemoError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")
    console.print(f"\nthe page: {page.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
