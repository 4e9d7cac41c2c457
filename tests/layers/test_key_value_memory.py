"""Keys of n-grams, and associations that are written, replaced, given up and read."""

import pytest
import torch
import torch.nn.functional as F

from helmholtz.layers.key_value_memory import KeyValueMemory, NGramKeys


def pairs(n, d=32, n_values=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randint(n_values, (n,), generator=generator)


# --- keys


def test_a_key_is_of_its_n_tokens_and_no_others():
    keys = NGramKeys(50, 32, n=3)
    tokens = torch.randint(50, (2, 12))
    out = keys(tokens)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 12))
    table = keys.table
    expected = F.normalize(table[0][tokens[0, 5]] + table[1][tokens[0, 4]] + table[2][tokens[0, 3]], dim=0)
    torch.testing.assert_close(out[0, 5], expected)
    torch.testing.assert_close(out[0, 0], F.normalize(table[0][tokens[0, 0]], dim=0))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 50
    same = (keys(changed) == out).all(-1).all(0)
    assert same.tolist() == [True] * 6 + [False] * 3 + [True] * 3
    assert keys(tokens[:, :2]).shape == (2, 2, 32)


def test_order_and_overlap_of_n_grams():
    keys = NGramKeys(2000, 256, n=2)
    out = keys(torch.tensor([[3, 7], [7, 3], [3, 8], [9, 7], [1, 2]]))[:, 1]
    cosine = out @ out[0]
    assert cosine[1].abs() < 0.25 and cosine[4].abs() < 0.25
    assert (cosine[2:4] - 0.5).abs().max() < 0.2


def test_keys_are_decided_by_the_seed_and_saved():
    tokens = torch.randint(50, (1, 4))
    keys, other = NGramKeys(50, 8, seed=1), NGramKeys(50, 8, seed=2)
    assert torch.equal(keys(tokens), NGramKeys(50, 8, seed=1)(tokens))
    assert not torch.equal(keys(tokens), other(tokens))
    other.load_state_dict(keys.state_dict())
    assert torch.equal(keys(tokens), other(tokens))
    assert not list(keys.parameters())


def test_pads_add_nothing_and_have_no_key():
    keys = NGramKeys(50, 8)
    tokens = torch.randint(50, (1, 5))
    padded = torch.cat([torch.full((1, 2), -7), tokens], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    out = keys(padded, mask)
    assert torch.equal(out[:, 2:], keys(tokens)) and not out[:, :2].any()
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 50\)"):
        keys(padded)


# --- memory


def test_what_was_written_is_read_and_what_was_not_is_not_answered():
    memory = KeyValueMemory(32, 10, 300)
    keys, values = pairs(200)
    assert memory.write(keys, values) == 200 == memory.num_stored
    assert memory.num_bytes == 200 * 64 * 4
    reading = memory.read(keys)
    assert reading.answered.all() and torch.equal(reading.value, values)
    assert (reading.confidence > 0.99).all()
    noisy = memory.read(F.normalize(keys, dim=-1) + 0.3 * F.normalize(pairs(200, seed=1)[0], dim=-1))
    assert torch.equal(noisy.value, values)
    assert not memory.read(pairs(200, seed=2)[0]).answered.any()


def test_an_empty_memory_answers_nothing():
    reading = KeyValueMemory(32, 10, 4).read(pairs(3)[0])
    assert not reading.answered.any() and not reading.confidence.any()


def test_a_stored_key_gets_its_new_value_in_place():
    memory = KeyValueMemory(32, 10, 5)
    keys, values = pairs(5)
    memory.write(keys, values)
    assert memory.write(keys[:2], values[:2]) == 0
    assert memory.write(3 * keys[:2], (values[:2] + 1) % 10) == 2
    assert memory.num_stored == 5 and int(memory.store.num_written) == 5
    values[:2] = (values[:2] + 1) % 10
    assert torch.equal(memory.read(keys).value, values)
    assert memory.write(keys[:1].repeat(3, 1), torch.tensor([1, 2, 3])) >= 2
    assert memory.read(keys[:1]).value.item() == 3


def test_pairs_of_one_call_are_written_in_their_order():
    """What was stored before the call counts at a pair's turn only: replaced or given up meanwhile, it comes again."""
    memory = KeyValueMemory(32, 10, 2)
    keys, _ = pairs(3)
    memory.write(keys[:1], torch.tensor([1]))
    assert memory.write(keys[[0, 0]], torch.tensor([2, 1])) == 2
    assert memory.read(keys[:1]).value.item() == 1
    memory.write(keys[1:2], torch.tensor([5]))
    assert memory.write(keys[[2, 0]], torch.tensor([7, 1])) == 2  # the third key takes the slot of the first
    reading = memory.read(keys)
    assert reading.answered.tolist() == [True, False, True] and reading.value[[0, 2]].tolist() == [1, 7]


def test_a_full_memory_gives_up_the_oldest_or_any():
    keys, values = pairs(90)
    fifo, reservoir = (KeyValueMemory(32, 10, 60, policy=policy) for policy in ("fifo", "reservoir"))
    assert fifo.write(keys, values) == 90
    assert 60 < reservoir.write(keys, values) < 90
    kept = fifo.read(keys).answered
    assert not kept[:30].any() and kept[30:].all()
    kept = reservoir.read(keys).answered
    assert kept.sum() == 60 and 0 < kept[60:].sum() < 30
    for memory in (fifo, reservoir):
        other = KeyValueMemory(32, 10, 60, policy=memory.store.policy, seed=5)
        other.load_state_dict(memory.state_dict())
        for m in (memory, other):
            m.write(*pairs(20, seed=3))
        assert torch.equal(memory.store.rows, other.store.rows)


def test_only_real_pairs_are_written():
    memory = KeyValueMemory(32, 10, 5)
    keys, values = pairs(3)
    keys[1], values[1] = torch.nan, -100
    assert memory.write(keys, values, torch.tensor([True, False, True])) == 2
    assert memory.read(keys[[0, 2]]).answered.all()


def test_evaluation_does_not_write_unless_asked():
    memory = KeyValueMemory(32, 10, 5).eval()
    with pytest.raises(ValueError, match="in_eval must be true to write in evaluation mode"):
        memory.write(*pairs(1))
    assert memory.write(*pairs(1), in_eval=True) == 1


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.ones(2, 31), torch.zeros(2).long(), r"keys must be of shape \(n, 32\)"),
        (torch.full((1, 32), torch.inf), torch.zeros(1).long(), "keys must be finite"),
        (torch.zeros(1, 32), torch.zeros(1).long(), "keys must be of a direction"),
        (torch.ones(1, 32), torch.tensor([10]), r"values must be in \[0, 10\)"),
        (torch.ones(1, 32), torch.zeros(2).long(), r"values must be of shape \(1,\)"),
    ],
)
def test_bad_pairs_are_refused(keys, values, message):
    memory = KeyValueMemory(32, 10, 5)
    with pytest.raises(ValueError, match=message):
        memory.write(keys, values)
    assert memory.num_stored == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_slots": 0}, "n_slots"),
        ({"n_values": 0}, "n_values"),
        ({"threshold": 0.0}, "threshold"),
        ({"beta": -1.0}, "beta"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        KeyValueMemory(**{"d_key": 8, "n_values": 4, "n_slots": 2, **arguments})
