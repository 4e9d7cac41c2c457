"""``make learn``: 20 steps of every architecture by two processes, as ``tests/distributed`` makes few."""

import pytest

from distributed_cases import (
    SIZES,
    STRATEGIES,
    assert_equal_runs,
    assert_same_run,
    distributed_run,
    make_runs,
)
from helmholtz.training.run import train
from tiny_runs import prepare_text

N_STEPS = 20


@pytest.mark.learn
@pytest.mark.timeout(4 * 3600)
def test_two_processes_make_the_run_of_one_whole_and_resumed(tmp_path):
    data = prepare_text(tmp_path)
    folder, settings = make_runs(tmp_path, data, N_STEPS)
    for architecture in SIZES:
        one = folder / f"{architecture}-one"
        for strategy in STRATEGIES:
            whole, resumed, half = (
                folder / f"{architecture}-{strategy}-{x}" for x in ("whole", "resumed", "half")
            )
            assert_same_run(one, whole, N_STEPS)
            assert_equal_runs(whole, resumed)
            train(
                distributed_run(
                    data, architecture=architecture, output=half, train=settings | {"resume": "auto"}
                )
            )
            assert_same_run(one, half, N_STEPS)
