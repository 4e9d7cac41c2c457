"""A fit keeps the weights of its lowest validation loss, stops when patience is out, and depends on its seed alone."""

import pytest
import torch
from torch import nn

from helmholtz.training.config import TrainConfig
from helmholtz.training.diagnosis import NonFiniteError
from helmholtz.training.fit import fit, fit_examples, shuffled

WEIGHT = torch.tensor([1.0, -2.0, 0.5])


def config(**options):
    sizes = {
        "steps": 40,
        "batch_size": 8,
        "lr": 0.05,
        "warmup_steps": 4,
        "weight_decay": 0.0,
        "eval_every": 10,
    }
    return TrainConfig(**sizes | options)


def problem(n=50):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 3, generator=generator)
    torch.manual_seed(2)
    return nn.Linear(3, 1), inputs, inputs @ WEIGHT.unsqueeze(1)


def learn(settings, *, patience=10, validate=None):
    model, inputs, targets = problem()

    def loss(batch):
        return (model(inputs[batch]) - targets[batch]).square().mean()

    everything = torch.arange(len(inputs))
    validate = validate or (lambda: loss(everything).item())
    return model, fit_examples(model, settings, len(inputs), loss, validate, patience=patience)


def test_it_learns_and_tells_how():
    model, found = learn(config(steps=205))
    assert [point.step for point in found.curve] == [*range(10, 201, 10), 205]
    assert found.steps == 205
    assert found.best == min(found.curve, key=lambda point: point.validation)
    assert found.best.validation < 1e-3 < found.curve[0].train
    torch.testing.assert_close(model.weight[0], WEIGHT, atol=0.05, rtol=0)


def test_the_weights_of_the_lowest_loss_are_kept_and_patience_ends_the_training():
    scores = iter([5.0, 3.0, 4.0, 3.5, 3.0, 0.0])
    model, found = learn(config(steps=60), patience=3, validate=lambda: next(scores))
    assert [point.validation for point in found.curve] == [5.0, 3.0, 4.0, 3.5, 3.0], (
        "no new minimum three times"
    )
    assert (found.steps, found.best.step) == (50, 20)
    reached, _ = learn(config(steps=60), validate=iter([2.0, 1.0, 3.0, 3.0, 3.0, 3.0]).__next__)
    assert torch.equal(model.weight, reached.weight), "those of step 20 of the same run"
    last, _ = learn(config(steps=60), validate=iter([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).__next__)
    assert not torch.equal(model.weight, last.weight)


def test_validation_sees_a_model_in_evaluation_mode_without_gradients():
    model, inputs, targets = problem()
    model = nn.Sequential(model, nn.Dropout(0.5))
    modes = []

    def loss(batch):
        modes.append(("train", model.training, torch.is_grad_enabled()))
        return (model(inputs[batch]) - targets[batch]).square().mean()

    def validate():
        modes.append(("validate", model.training, torch.is_grad_enabled()))
        return 1.0

    fit_examples(model, config(steps=20), 50, loss, validate, patience=5)
    assert set(modes) == {("train", True, True), ("validate", False, False)}


def test_an_epoch_takes_no_example_twice_and_the_seed_decides_the_order():
    def batches(seed):
        model, inputs, targets = problem()
        seen = []

        def loss(batch):
            seen.append(batch.tolist())
            return (model(inputs[batch]) - targets[batch]).square().mean()

        fit_examples(model, config(steps=12, seed=seed), 50, loss, lambda: 1.0, patience=9)
        return seen

    first = batches(0)
    assert all(len(batch) == 8 for batch in first)
    epochs = [sum(first[:6], []), sum(first[6:], [])]
    assert all(len(set(epoch)) == 48 for epoch in epochs) and epochs[0] != epochs[1]
    assert batches(0) == first != batches(1)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(NonFiniteError, match="the validation loss is nan"):
        learn(config(), validate=lambda: float("nan"))
    model, _, _ = problem()
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        fit_examples(
            model, config(), 50, lambda batch: model.weight.sum() * torch.nan, lambda: 1.0, patience=1
        )
    with pytest.raises(ValueError, match="n_examples must be an integer of at least 8, got 7"):
        fit_examples(model, config(), 7, lambda batch: model.weight.sum(), lambda: 1.0, patience=1)
    with pytest.raises(ValueError, match="patience must be an integer of at least 1, got 0"):
        learn(config(), patience=0)


def test_the_training_loss_of_a_point_is_the_mean_since_the_one_before():
    model, inputs, targets = problem()
    losses = []

    def loss(batch):
        found = (model(inputs[batch]) - targets[batch]).square().mean()
        losses.append(found.item())
        return found

    found = fit_examples(model, config(steps=20), 50, loss, lambda: 1.0, patience=9)
    assert [point.step for point in found.curve] == [10, 20]
    means = [sum(part) / 10 for part in (losses[:10], losses[10:])]
    assert [point.train for point in found.curve] == pytest.approx(means)


def drawn(n):
    """Fresh batches of the same law, without end or ``n`` of them."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, generator=generator) for _ in range(n)]


def error_of(model):
    return lambda inputs: (model(inputs) - inputs @ WEIGHT.unsqueeze(1)).square().mean()


def test_steps_are_those_of_a_plain_loop():
    model, plain = problem()[0].eval(), problem()[0]
    optimizer, other = (torch.optim.SGD([{"params": [m.weight]}, {"params": [m.bias], "lr_factor": 0.5}], lr=9.0)
                        for m in (model, plain))  # fmt: skip
    told = []
    skipped = fit(
        model, drawn(5), error_of(model), optimizer, lr=lambda step: 0.1 / (step + 1), clip_norm=0.7,
        callback=lambda step, loss: told.append((step, loss)),
    )  # fmt: skip
    losses = []
    for step, batch in enumerate(drawn(5)):
        other.param_groups[0]["lr"], other.param_groups[1]["lr"] = 0.1 / (step + 1), 0.05 / (step + 1)
        loss = error_of(plain)(batch)
        other.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
        other.step()
        losses.append((step + 1, loss.item()))
    assert told == losses and skipped == 0 and model.training
    assert torch.equal(model.weight, plain.weight) and torch.equal(model.bias, plain.bias)


def test_a_callback_ends_the_training_and_without_a_schedule_the_rate_is_the_optimizers():
    model = problem()[0]
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.25), []
    fit(
        model,
        drawn(9),
        error_of(model),
        optimizer,
        callback=lambda step, loss: steps.append(step) or step == 4,
    )
    assert steps == [1, 2, 3, 4] and optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_leaves_the_weights_alone(what):
    model = problem()[0]
    before = model.weight.detach().clone()

    def loss(batch):
        if what == "loss":
            return model.weight.sum() * torch.inf
        return (model.weight.square() - model.weight.square()).abs().sqrt().sum()  # 0, with an infinite slope

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match=f"step 1: the {what} is"):
        fit(model, drawn(3), loss, optimizer)
    assert fit(model, drawn(3), loss, optimizer, skip_non_finite=True) == 3
    assert torch.equal(model.weight, before)


def test_shuffled_epochs_keep_or_drop_what_fills_no_batch():
    for drop_last, sizes in ((False, [4, 4, 2]), (True, [4, 4])):
        order = shuffled(10, 4, generator=torch.Generator().manual_seed(0), drop_last=drop_last)
        epochs = [[next(order) for _ in sizes] for _ in range(2)]
        assert [len(rows) for rows in epochs[0]] == sizes
        assert all(len(set(torch.cat(rows).tolist())) == sum(sizes) for rows in epochs)
        assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
