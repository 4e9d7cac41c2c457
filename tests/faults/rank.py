"""What torchrun starts in the fault matrix: a tiny run of which one rank gets a signal at a chosen event.

    torchrun --nproc-per-node=2 tests/faults/rank.py DATA_FOLDER OUTPUT RANK EVENT SIGNAL '{"steps": 12}'

Event 0 is never. After a restart by torchrun no signal is sent.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from rich.console import Console  # noqa: E402

from fault_cases import Killer, Notes, beside  # noqa: E402
from helmholtz.data.prepare import DataConfig  # noqa: E402
from helmholtz.training.distributed import LostRankError, is_main_process  # noqa: E402
from helmholtz.training.run import train  # noqa: E402
from tiny_runs import tiny_run  # noqa: E402


def main() -> int:
    data_folder, output, rank, event, number, changes = sys.argv[1:]
    data = DataConfig(folder=data_folder, tokenizer="bytes", validation_fraction=0.1)
    folder, mine = Path(output), os.environ["RANK"] == rank
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    killer = Killer(folder, int(event) if mine and first and int(event) else None, int(number))
    note = Notes(beside(folder, "notes") if is_main_process() else Path(os.devnull), killer.event)
    run = tiny_run(data, folder, resume="auto", **json.loads(changes))
    try:
        result = train(run, callbacks=[note], console=Console(width=200))
    except LostRankError as error:
        print(f"helmholtz train: {error}", flush=True)
        return 1
    if is_main_process():
        print(f"{result.status} after step {result.step}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
