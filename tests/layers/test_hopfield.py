"""The Hopfield memory: its two blocks, what is written, what is recalled."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch import Tensor, nn

from helmholtz import ops
from helmholtz.layers.hopfield import (
    RECALL,
    AssociativeProblem,
    HopfieldMemory,
    MarginWarning,
    NoveltyWarning,
    WriteResult,
)
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
    result = memory.write(torch.stack([first, 5 * first, first + 0.05 * other]), warn=False)
    alike = {"merged": 2, "dropped": 0} if policy == "merge" else {"merged": 0, "dropped": 2}
    assert result == WriteResult(stored=1, replaced=0, **alike)
    assert result.changed == (3 if policy == "merge" else 1)
    assert int(memory.occupied.sum()) == 1
    assert memory.write(other.unsqueeze(0)).stored == 1
    expected = F.normalize(first, dim=0)
    if policy == "merge":
        expected = F.normalize(2 * expected + F.normalize(first + 0.05 * other, dim=0), dim=0)
        assert memory.store.counts.tolist()[:2] == [3, 1]
    torch.testing.assert_close(directions(memory)[0], expected)


def test_fifo_gives_up_the_oldest():
    memory = HopfieldMemory(16, 0, n_slots=4)
    rows = rows_of(6)
    assert memory.write(rows[:3]) == WriteResult(stored=3, merged=0, dropped=0, replaced=0)
    assert memory.write(rows[3:]) == WriteResult(stored=3, merged=0, dropped=0, replaced=2)
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
    result = memory.write(rows.double(), warn=False)
    assert result.changed == changed and result.changed + result.dropped == len(rows)
    assert memory.store.counts.tolist() == counts
    torch.testing.assert_close(memory.slots / memory.radius, slots)


def test_only_real_rows_are_written():
    memory = HopfieldMemory(16, 0, n_slots=8)
    rows = rows_of(3)
    rows[1] = torch.nan
    assert memory.write(rows, torch.tensor([1, 0, 1])).stored == 2
    torch.testing.assert_close(directions(memory), F.normalize(rows[[0, 2]], dim=-1))
    assert memory.write(rows[:0]) == WriteResult(stored=0, merged=0, dropped=0, replaced=0)


def test_evaluation_does_not_write_unless_asked():
    memory = HopfieldMemory(16, 0, n_slots=8).eval()
    with pytest.raises(ValueError, match="in_eval must be true to write in evaluation mode, got False"):
        memory.write(rows_of(1))
    assert not memory.occupied.any()
    assert memory.write(rows_of(1), in_eval=True).stored == 1


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
    memory.write(rows_of(60, 64, seed=3))
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


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_an_offloaded_memory_recalls_the_same(offload_buffers):
    memory = HopfieldMemory(64, 5, n_slots=4)
    memory.write(rows_of(3, 64, 2))
    query = memory.patterns().detach()[:7] + 0.2 * rows_of(7, 64, 1)
    expected, margin = memory.retrieve(query).value, memory.margin()
    cpu_offload(memory, execution_device="cpu", offload_buffers=offload_buffers)
    assert memory.memory_patterns.is_meta and memory.slots.is_meta == offload_buffers
    assert torch.equal(memory.retrieve(query).value, expected) and memory.margin() == margin


def test_recall_from_nothing_is_nothing():
    solution = HopfieldMemory(16, 0, n_slots=4).retrieve(rows_of(3))
    assert torch.equal(solution.value, torch.zeros(3, 16)) and solution.converged.all()


def test_a_memory_beyond_its_margin_warns_and_a_wide_one_does_not():
    crowded = HopfieldMemory(32, 4096)
    margins = ops.pattern_margins(crowded.patterns().detach(), 2.0)
    assert crowded.margin() == margins.min() < margins.median() < 1.2
    with pytest.warns(MarginWarning, match=r"the retrieval margin is [01]\.\d\d nats.*take a larger beta"):
        value = crowded.retrieve(crowded.patterns()[:8].detach()).value
    assert value.norm(dim=-1).max() < 0.5 * crowded.radius  # the mean of all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HopfieldMemory(64, 512).retrieve(rows_of(2, 64))


@pytest.mark.parametrize("beta", [16.0, 50.0, 200.0])
def test_a_large_beta_recalls_and_does_not_warn(beta):
    memory = HopfieldMemory(64, 0, n_slots=100, beta=beta)
    memory.write(rows_of(100, 64))
    value = memory.retrieve(memory.slots + 0.5 * rows_of(100, 64, seed=1)).value
    assert torch.equal((value @ memory.slots.T).argmax(-1), torch.arange(100))
    assert memory.margin() > 50


def test_only_what_is_recalled_is_warned_of():
    memory = HopfieldMemory(64, 0, n_slots=8, novelty=1.0)
    rows = rows_of(6, 64)
    memory.write(torch.cat([rows, rows[:1] + 0.05 * rows[1:2]]))
    assert memory.margin() < 1  # of the first and its twin
    memory.retrieve(memory.slots[1:6])
    with pytest.warns(MarginWarning, match="below 3 of 1 of the 2 patterns recalled"):
        memory.retrieve(memory.slots[:2])


def raw_rows(n=5, width=256):
    """Positive rows in 0..255 that share a large mean, as images do; cosines about .91."""
    rows = torch.linspace(40, 220, width) + 46 * rows_of(n, width)
    rows = rows.clamp(0, 255).round()
    cosine = F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).T
    assert cosine.min() > 0.88 and cosine.fill_diagonal_(0).max() < 0.93
    return rows


def test_rows_that_are_dropped_are_told_once():
    memory = HopfieldMemory(256, 0, n_slots=8)
    rows = torch.cat([raw_rows(), 0.5 * raw_rows()[:2] + 10 * rows_of(2, 256, 1)])
    with pytest.warns(NoveltyWarning, match=r"[2-6] of 7 rows were not stored.*subtract it first"):
        result = memory.write(rows)
    assert result.dropped >= 2 and result.stored == int(memory.occupied.sum()) == 7 - result.dropped
    assert memory.write(rows).dropped >= 2  # told before
    assert memory.write(rows - rows.mean(0), warn=False).stored >= 5
    full = HopfieldMemory(256, 0, n_slots=2, policy="reservoir")
    assert full.write(rows_of(50, 256)).dropped > 30  # the sample's choice: nothing was too close


def test_rows_that_are_nearly_parallel_have_a_small_margin_until_their_mean_is_taken_off():
    raw, memory = raw_rows(), HopfieldMemory(256, 0, n_slots=5, novelty=0.99)
    assert memory.write(raw).stored == 5
    assert ops.retrieval_margin(256, 5, 2.0, memory.radius) > 25 and memory.margin() < 3
    masked = raw * (torch.arange(256) < 128)
    with pytest.warns(MarginWarning, match="patterns recalled: they blend.*subtract the mean"):
        memory.retrieve(masked)
    centred = HopfieldMemory(256, 0, n_slots=5)
    centred.write(raw - raw.mean(0))
    assert centred.margin() > 25
    value = centred.retrieve((raw - raw.mean(0)) * (torch.arange(256) < 128)).value
    assert torch.equal((value @ centred.slots.T).argmax(-1), torch.arange(5))


def test_queries_too_small_for_the_patterns_are_told():
    memory = HopfieldMemory(64, 100)
    query = memory.patterns().detach()[:3]
    with pytest.warns(MarginWarning, match=r"3 of 3 queries .*\(down to 0\.1 of their norm, 2\.83\)"):
        value = memory.retrieve(0.1 * query).value
    assert value.isfinite().all()


def test_margins_of_empty_and_lone_memories_are_infinite():
    assert HopfieldMemory(16, 0, n_slots=4).margin() == math.inf
    assert HopfieldMemory(16, 1, n_slots=4).margin() == math.inf
    assert HopfieldMemory(16, 0).margin() == math.inf


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
