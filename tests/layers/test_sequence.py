"""Where tokens stand: masks, packing and streams become positions and resets."""

import pytest
import torch

from helmholtz.layers.sequence import reversed_reset, sequence_layout


def rows(batch, time):
    return torch.zeros(batch, time, 3)


def test_without_masks_positions_are_shared():
    layout = sequence_layout(rows(2, 4))
    assert layout.positions.tolist() == [0, 1, 2, 3]
    assert layout.mask is layout.reset is layout.cu_seqlens is None
    assert layout.advance(torch.tensor([5, 0])).tolist() == [9, 4]


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
    layout = sequence_layout(rows(2, 5), attention_mask=mask)
    assert layout.positions[0, 2:].tolist() == [0, 1, 2] and layout.positions[1, [0, 2, 4]].tolist() == [
        0,
        1,
        2,
    ]
    assert (layout.positions >= 0).all()
    assert layout.mask.dtype == torch.bool and torch.equal(layout.mask, mask == 1)
    later = sequence_layout(rows(2, 5), attention_mask=mask, position=torch.tensor([7, 100]))
    assert later.positions[0, 2:].tolist() == [7, 8, 9] and later.positions[1, [0, 2, 4]].tolist() == [
        100,
        101,
        102,
    ]
    assert later.advance(torch.tensor([7, 100])).tolist() == [10, 103]


def test_a_stream_continues_each_row_where_it_stopped():
    layout = sequence_layout(rows(2, 3), position=torch.tensor([4, 0]))
    assert layout.positions.tolist() == [[4, 5, 6], [0, 1, 2]]


def test_packed_sequences_start_at_zero_each():
    layout = sequence_layout(rows(1, 7), cu_seqlens=torch.tensor([0, 1, 5, 7], dtype=torch.int32))
    assert layout.positions.tolist() == [0, 0, 1, 2, 3, 0, 1]
    assert layout.reset.tolist() == [[True, True, False, False, False, True, False]]
    assert reversed_reset(layout.reset).flip(1).tolist() == [[True, False, False, False, True, False, True]]
    assert reversed_reset(None) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_any_integer_is_a_mask(dtype):
    mask = torch.tensor([[0, 1, 1]]).to(dtype)
    assert sequence_layout(rows(1, 3), attention_mask=mask).mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_floating_mask_is_refused(dtype):
    with pytest.raises(ValueError, match="attention_mask: wanted bool or integer"):
        sequence_layout(rows(1, 3), attention_mask=torch.ones(1, 3, dtype=dtype))


@pytest.mark.parametrize("size", [(3,), (2, 3), (1, 4), (1, 1, 3), (1, 3, 3), ()], ids=str)
def test_a_mask_of_another_shape_is_refused(size):
    with pytest.raises(ValueError, match=r"attention_mask: wanted shape \(1, 3\) as the input's, got"):
        sequence_layout(rows(1, 3), attention_mask=torch.ones(size, dtype=torch.bool))


@pytest.mark.parametrize(
    "bounds", [[0], [], [1, 3], [0, 2], [0, 4], [0, 2, 2, 3], [0, 2, 1, 3], [-1, 3]], ids=str
)
def test_bounds_must_increase_from_0_to_the_length(bounds):
    with pytest.raises(ValueError, match="cu_seqlens: wanted increasing bounds from 0 to 3, got"):
        sequence_layout(rows(1, 3), cu_seqlens=torch.tensor(bounds, dtype=torch.long))


def test_bounds_must_be_one_row_of_integers():
    for wrong in (torch.tensor([[0, 3]]), torch.tensor([0.0, 3.0]), torch.tensor([False, True])):
        with pytest.raises(ValueError, match="cu_seqlens: wanted a 1-D integer tensor, got"):
            sequence_layout(rows(1, 3), cu_seqlens=wrong)
    with pytest.raises(ValueError, match="cu_seqlens: .* one row, got a batch of 2"):
        sequence_layout(rows(2, 3), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="exclude each other"):
        sequence_layout(rows(1, 3), attention_mask=torch.ones(1, 3).bool(), cu_seqlens=torch.tensor([0, 3]))


def test_a_state_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="state: it belongs to 3 rows, the input has 2"):
        sequence_layout(torch.zeros(2, 5, 4), position=torch.zeros(3, dtype=torch.long))
