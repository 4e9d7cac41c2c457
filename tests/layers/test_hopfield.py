"""The Hopfield memory: its two blocks, what is written, what is recalled."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helmholtz import ops
from helmholtz.layers.hopfield import RECALL, AssociativeProblem, HopfieldMemory, MarginWarning
from helmholtz.layers.slots import Slots, hash_below
from helmholtz.solvers import SolverConfig


def rows_of(n, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def directions(memory):
    return F.normalize(memory.slots[memory.occupied], dim=-1)


def test_learned_patterns_have_the_radius_and_come_first():
    memory = HopfieldMemory(16, 5, n_slots=3)
    memory.write(rows_of(2))
    patterns = memory.patterns()
    assert memory.radius == pytest.approx(2.0)
    torch.testing.assert_close(patterns.norm(dim=-1), torch.tensor([2.0] * 7 + [0.0]))
    torch.testing.assert_close(patterns[:5], 2 * F.normalize(memory.memory_patterns, dim=-1))
    torch.testing.assert_close(patterns[5:7], 2 * F.normalize(rows_of(2), dim=-1))
    assert memory.log_prior().tolist() == [0.0] * 7 + [-math.inf]
    assert HopfieldMemory(16, 5).log_prior() is None
    assert [name for name, _ in memory.named_parameters()] == ["memory_patterns"]
    patterns.sum().backward()
    assert memory.memory_patterns.grad.isfinite().all() and memory.memory_patterns.grad.any()


@pytest.mark.parametrize("policy", ["fifo", "reservoir", "merge"])
def test_a_row_close_to_a_stored_one_is_not_novel(policy):
    memory = HopfieldMemory(16, 0, n_slots=8, policy=policy)
    first, other = rows_of(2)
    assert memory.write(torch.stack([first, 5 * first, first + 0.05 * other])) == (
        3 if policy == "merge" else 1
    )
    assert int(memory.occupied.sum()) == 1
    assert memory.write(other.unsqueeze(0)) == 1
    expected = F.normalize(first, dim=0)
    if policy == "merge":
        expected = F.normalize(2 * expected + F.normalize(first + 0.05 * other, dim=0), dim=0)
        assert memory.store.counts.tolist()[:2] == [3, 1]
    torch.testing.assert_close(directions(memory)[0], expected)


def test_fifo_gives_up_the_oldest():
    memory = HopfieldMemory(16, 0, n_slots=4)
    rows = rows_of(6)
    assert memory.write(rows[:3]) + memory.write(rows[3:]) == 6
    torch.testing.assert_close(directions(memory), F.normalize(rows[[4, 5, 2, 3]], dim=-1))


def test_hashes_look_random():
    counts = torch.bincount(torch.tensor([hash_below(number, 10) for number in range(20_000)]), minlength=10)
    assert (counts / 2000 - 1).abs().max() < 0.1


def test_reservoir_is_a_uniform_sample():
    """Of 600 rows in 60 slots, each sixth of the rows leaves about 10; binomially, 5 standard deviations wide."""
    slots, number_in = Slots(1, 60, "reservoir"), {}
    for number in range(600):
        slot = slots.next_slot()
        if slot is not None:
            number_in[slot] = number
    assert len(number_in) == 60
    for part in range(6):
        kept = sum(100 * part <= number < 100 * (part + 1) for number in number_in.values())
        assert 0 < kept < 10 + 5 * math.sqrt(9)


@pytest.mark.parametrize("policy", ["fifo", "reservoir", "merge"])
def test_a_restored_memory_goes_on_as_the_saved_one(policy):
    memory, restored = (HopfieldMemory(16, 2, n_slots=5, policy=policy) for _ in range(2))
    memory.write(rows_of(9))
    restored.load_state_dict(memory.state_dict())
    for m in (memory, restored):
        m.write(rows_of(7, seed=1))
    for name, buffer in memory.state_dict().items():
        assert torch.equal(buffer, restored.state_dict()[name]), name
    assert set(memory.state_dict()) == {
        "memory_patterns", "store.rows", "store.counts", "store.cursor", "store.num_written"
    }  # fmt: skip


def one_by_one(rows, n_slots, policy, novelty):
    """What 600 calls of the definition would leave: directions, counts and the number of changes."""
    slots, counts, cursor, asked, changed = [None] * n_slots, [0] * n_slots, 0, 0, 0
    for row in F.normalize(rows, dim=-1):
        held = [i for i in range(n_slots) if slots[i] is not None]
        closest = max(held, key=lambda i: float(slots[i] @ row), default=None)
        if closest is not None and slots[closest] @ row >= novelty:
            if policy == "merge":
                slots[closest] = F.normalize(counts[closest] * slots[closest] + row, dim=0)
                counts[closest] += 1
                changed += 1
            continue
        if policy == "reservoir":
            slot = asked if asked < n_slots else hash_below(asked, asked + 1)
        else:
            slot, cursor = cursor, (cursor + 1) % n_slots
        asked += 1
        if slot < n_slots:
            slots[slot], counts[slot] = row, 1
            changed += 1
    return torch.stack(slots), counts, changed


@pytest.mark.parametrize("policy", ["fifo", "reservoir", "merge"])
@pytest.mark.parametrize("novelty", [0.9, 1.0])
def test_many_rows_at_once_are_written_as_one_by_one(policy, novelty):
    """A third of the rows are near others: some of these are stored, some have just been given up."""
    rows = rows_of(200, 8)
    again = torch.randint(200, (300,), generator=torch.Generator().manual_seed(1))
    rows = torch.cat([rows[:100], rows[again] + 0.1 * rows_of(300, 8, 2), rows[100:]])
    slots, counts, changed = one_by_one(rows.double(), 20, policy, novelty)
    memory = HopfieldMemory(8, 0, n_slots=20, policy=policy, novelty=novelty).double()
    assert memory.write(rows.double()) == changed
    assert memory.store.counts.tolist() == counts
    torch.testing.assert_close(memory.slots / memory.radius, slots)


def test_only_real_rows_are_written():
    memory = HopfieldMemory(16, 0, n_slots=8)
    rows = rows_of(3)
    rows[1] = torch.nan
    assert memory.write(rows, torch.tensor([1, 0, 1])) == 2
    torch.testing.assert_close(directions(memory), F.normalize(rows[[0, 2]], dim=-1))
    assert memory.write(rows[:0]) == 0


def test_evaluation_does_not_write_unless_asked():
    memory = HopfieldMemory(16, 0, n_slots=8).eval()
    with pytest.raises(ValueError, match="in_eval must be true to write in evaluation mode, got False"):
        memory.write(rows_of(1))
    assert not memory.occupied.any()
    assert memory.write(rows_of(1), in_eval=True) == 1


def test_written_rows_carry_no_gradient():
    memory = HopfieldMemory(16, 2, n_slots=8)
    before = memory.patterns()
    memory.write(rows_of(2).requires_grad_())
    assert not memory.slots.requires_grad
    before.sum().backward()  # what was computed before is not spoilt by the write


@pytest.mark.parametrize(
    ("rows", "mask", "message"),
    [
        (rows_of(2, 15), None, r"rows must be of shape \(n, 16\), got \(2, 15\)"),
        (rows_of(2) * torch.nan, None, "rows must be finite in every row that is real"),
        (torch.cat([rows_of(1), torch.full((1, 16), torch.inf)]), None, "rows must be finite"),
        (torch.zeros(1, 16), None, "rows must be of a direction"),
        (rows_of(2), torch.ones(3), r"mask must be of shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(rows, mask, message):
    memory = HopfieldMemory(16, 0, n_slots=8)
    with pytest.raises(ValueError, match=message):
        memory.write(rows, mask)
    assert not memory.occupied.any() and not memory.store.num_written.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model"),
        ({"n_patterns": -1}, "n_patterns"),
        ({"n_slots": -1}, "n_slots"),
        ({"beta": 0.0}, "beta"),
        ({"novelty": 1.5}, r"novelty must be in \(0, 1\]"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        HopfieldMemory(**{"d_model": 16, "n_patterns": 4, **arguments})


def test_a_memory_without_slots_refuses_to_be_written():
    with pytest.raises(ValueError, match="n_slots must be positive for a memory that is written, got 0"):
        HopfieldMemory(16, 4).write(rows_of(1))


# --- recall


def test_recall_of_noisy_patterns():
    memory = HopfieldMemory(64, 100, n_slots=100)
    memory.write(rows_of(60, 64))
    stored = memory.patterns()[:160].detach()
    noise = F.normalize(rows_of(160, 64, seed=2), dim=-1)
    solution = memory.retrieve(stored + 0.8 * memory.radius * noise)
    assert solution.converged.all()
    assert (solution.value - stored).norm(dim=-1).max() < 0.1 * memory.radius
    energy = ops.hopfield_energy(solution.value, memory.patterns(), 2.0, memory.log_prior())
    torch.testing.assert_close(solution.energy + memory.radius**2 / 2, energy, atol=1e-4, rtol=1e-4)


def recall(memory: HopfieldMemory, solver: SolverConfig) -> Callable[..., Tensor]:
    """A function of queries and learned patterns: random sums of what is recalled and of its energy."""
    weights = rows_of(5, memory.d_model, 9).double()

    class Recall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = memory

        def forward(self, query: Tensor) -> Tensor:
            solution = self.memory.retrieve(query, solver)
            return (solution.value * weights).sum() + solution.energy.square().sum()

    module = Recall()
    name = "memory.memory_patterns"
    return lambda query, patterns: torch.func.functional_call(module, {name: patterns}, (query,))


@pytest.mark.filterwarnings("ignore::helmholtz.layers.hopfield.MarginWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mode", ["picard", "simultaneous"])
def test_recall_is_differentiable_in_queries_and_patterns(mode):
    memory = HopfieldMemory(8, 3, n_slots=4, beta=0.5).double()
    memory.write(rows_of(2, 8, 3).double())
    tight = SolverConfig(mode=mode, max_steps=200, rtol=1e-10, energy_rtol=1e-10, on_nonconvergence="raise")
    f = recall(memory, RECALL if mode == "picard" else tight)
    points = rows_of(5, 8).double(), memory.memory_patterns.detach()
    leaves = [x.clone().requires_grad_() for x in points]
    found = torch.autograd.grad(f(*leaves), leaves, materialize_grads=True)
    assert found[1].norm() > 0.1 and (found[0].norm() > 1e-4) == (mode == "picard")
    for i, gradient in enumerate(found):
        v = rows_of(*gradient.shape, 4).double()
        ends = [f(*(x + s * v if k == i else x for k, x in enumerate(points))) for s in (1e-6, -1e-6)]
        expected = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * v).sum(), expected, rtol=1e-6, atol=1e-7)
    if mode == "picard":
        torch.testing.assert_close(torch.func.grad(f, argnums=(0, 1))(*points), found)
        tangent = torch.func.jvp(f, points, tuple(map(torch.ones_like, points)))[1]
        torch.testing.assert_close(tangent, sum(x.sum() for x in found))
    with torch.no_grad():
        assert not memory.retrieve(points[0]).value.requires_grad


def test_recall_from_nothing_is_nothing():
    solution = HopfieldMemory(16, 0, n_slots=4).retrieve(rows_of(3))
    assert torch.equal(solution.value, torch.zeros(3, 16)) and solution.converged.all()


def test_a_memory_beyond_its_margin_warns_and_a_wide_one_does_not():
    crowded = HopfieldMemory(32, 4096)
    assert crowded.margin() == pytest.approx(1.0, abs=0.05)
    with pytest.warns(MarginWarning, match=r"the retrieval margin is 1\.00 nats.*take a larger beta"):
        value = crowded.retrieve(crowded.patterns()[:8].detach()).value
    assert value.norm(dim=-1).max() < 0.5 * crowded.radius  # the mean of all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HopfieldMemory(64, 512).retrieve(rows_of(2, 64))


def test_recall_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="query must be finite"):
        HopfieldMemory(64, 4).retrieve(torch.full((1, 64), torch.nan))


def test_all_modes_recall_the_same_far_from_the_boundaries():
    memory = HopfieldMemory(64, 40)
    query = memory.patterns().detach() + 0.3 * rows_of(40, 64)
    picard = memory.retrieve(query)
    for mode in ("alternating", "simultaneous", "cascade", "anderson"):
        solution = memory.retrieve(query, SolverConfig(mode=mode, rtol=1e-5))
        torch.testing.assert_close(solution.value, picard.value, atol=2e-3, rtol=0)


def test_the_problem_is_the_gradient_of_its_energy():
    patterns, z, v = rows_of(9, 5).double(), rows_of(4, 5, 1).double(), rows_of(4, 5, 2).double()
    problem = AssociativeProblem(patterns, 2.0, torch.tensor([0.0] * 8 + [-math.inf]))
    z.requires_grad_()
    f, energy = problem.map_and_energy(z)
    (slope,) = torch.autograd.grad(energy.sum(), z)
    torch.testing.assert_close(slope, z - f)
    assert torch.equal(f, problem.map(z))
    _, product = torch.autograd.functional.jvp(problem.map, z.detach(), v)
    torch.testing.assert_close(problem.jvp(z.detach(), v), product)
    assert problem.take(torch.tensor([0, 2])) is problem
