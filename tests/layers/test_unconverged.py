"""One warning for many calls."""

import warnings

import pytest
import torch

from equilibrium_cases import make_model
from helmholtz.layers.unconverged import one_convergence_warning
from helmholtz.models import Transformer
from helmholtz.models.transformer import TransformerConfig
from helmholtz.solvers import ConvergenceError, ConvergenceWarning, SolverConfig

ONE_STEP = SolverConfig(max_steps=1, rtol=1e-9)
TOKENS = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(0))


def messages(block):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block()
    assert {w.category for w in caught} <= {ConvergenceWarning}
    return [str(w.message) for w in caught]


def test_calls_and_steps_are_counted_together_and_the_solver_is_the_own_afterwards():
    model = make_model()
    model.solver = ONE_STEP

    def block():
        with one_convergence_warning(model):
            model(TOKENS)
            model(TOKENS[:1])
            model.step(TOKENS, model.init_state(2))

    found = messages(block)
    assert len(found) == 1
    assert found[0].startswith("25 of 25 tokens did not converge (largest relative residual ")
    assert model.solver is ONE_STEP
    assert model.equilibrium.observer is None
    assert len(messages(lambda: [model(TOKENS), model(TOKENS)])) == 2


def test_nothing_is_said_where_all_converge_or_the_user_wants_silence():
    model = make_model()
    for solver in (SolverConfig(max_steps=100), SolverConfig(max_steps=1, on_nonconvergence="ignore")):
        model.solver = solver

        def block():
            with one_convergence_warning(model):
                model(TOKENS)

        assert messages(block) == []
    plain = Transformer(TransformerConfig(vocab_size=37, d_model=16, n_layers=1))
    with one_convergence_warning(plain):
        plain(TOKENS)


def test_a_solver_that_raises_still_does():
    model = make_model()
    model.solver = SolverConfig(max_steps=1, rtol=1e-9, on_nonconvergence="raise")
    with pytest.raises(ConvergenceError), one_convergence_warning(model):
        model(TOKENS)


def test_an_exception_inside_restores_the_solver():
    model = make_model()
    model.solver = ONE_STEP
    with pytest.raises(KeyError), one_convergence_warning(model):
        raise KeyError("inside")
    assert model.solver is ONE_STEP
    assert model.equilibrium.observer is None
