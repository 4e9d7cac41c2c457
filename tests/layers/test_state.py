"""Memory of a stream: allocated once, and what was handed out never changes, however a state is continued."""

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fem_cases import make_mixer
from helmholtz.layers import Attention
from helmholtz.layers.state import KVCache, map_state


def empty() -> KVCache:
    return KVCache.empty(torch.zeros(2, dtype=torch.long), 3, 4, 5)


def tokens(time: int, value: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.full((2, 3, time, 4), value, dtype=dtype), torch.full((2, 3, time, 5), -value, dtype=dtype)


def column(cache: KVCache) -> list[float]:
    assert torch.equal(cache.k[..., :1], -cache.v[..., :1])
    return cache.k[1, 2, :, 0].tolist()


@torch.no_grad()
def test_memory_is_allocated_once_for_the_length_that_is_asked_for() -> None:
    cache, places = empty(), set()
    for value in range(1, 9):
        cache = cache.append(*tokens(1, value), capacity=8)
        places.add((cache.k.data_ptr(), cache.v.data_ptr()))
    assert len(places) == 1 and column(cache) == list(range(1, 9))
    assert cache.k.untyped_storage().nbytes() == 4 * 2 * 3 * 8 * 4
    over = cache.append(*tokens(1, 9), capacity=8)
    assert over.k.data_ptr() != cache.k.data_ptr() and column(over) == list(range(1, 10))


@torch.no_grad()
def test_memory_of_an_unknown_length_is_doubled() -> None:
    cache, places, allocated = empty(), [], 0
    for value in range(1, 201):
        cache = cache.append(*tokens(1, value))
        if cache.k.data_ptr() not in places:
            places.append(cache.k.data_ptr())
            allocated += cache.k.untyped_storage().nbytes()
    assert column(cache) == list(range(1, 201))
    assert allocated <= 5 * cache.k.numel() * 4, "amortised: a constant number of copies per token"


CONTINUED = {
    "as it is": lambda cache: cache,
    "deep copy": copy.deepcopy,
    "picked rows": lambda cache: map_state(lambda x: x[[0, 1]], cache),
    "a view of its rows": lambda cache: map_state(lambda x: x[:2], cache),
    "detached": lambda cache: map_state(Tensor.detach, cache),
}


@pytest.mark.parametrize("capacity", [None, 3, 16])
@pytest.mark.parametrize("how", CONTINUED)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_branches_of_one_state_do_not_meet(how: str, capacity: int | None, masked: bool) -> None:
    """Every state of a tree of continuations holds its own tokens, in whatever order they were made."""
    mask = torch.tensor([[True], [False]]) if masked else None
    root = empty().append(*tokens(2, 1), capacity=capacity)
    wanted = {0: [1.0, 1.0]}
    states = {0: root}
    for child, parent in enumerate([0, 1, 1, 0, 2, 3, 2, 5, 0, 1, 9, 10], start=1):
        before = CONTINUED[how](states[parent])
        states[child] = before.append(*tokens(1, child + 1), mask, capacity=capacity)
        wanted[child] = [*wanted[parent], child + 1.0]
        for name, state in states.items():
            assert column(state) == wanted[name]
            real = [True, True] + [False] * (len(wanted[name]) - 2)
            assert state.mask is None if not masked or name == 0 else state.mask[1].tolist() == real


@torch.no_grad()
def test_a_mask_that_comes_late_or_not_always() -> None:
    mask, cache = torch.tensor([[True], [False]]), empty().append(*tokens(2, 1), capacity=9)
    for given in (None, mask, None, mask):
        cache = cache.append(*tokens(1, 2), given, capacity=9)
    assert cache.mask.tolist() == [[True] * 6, [True, True, True, False, True, False]]
    assert cache.position.tolist() == [6, 4]


@torch.no_grad()
def test_a_wider_dtype_is_kept_and_a_narrower_one_joins() -> None:
    cache = empty().append(*tokens(1, 1, torch.bfloat16), capacity=9)
    assert cache.k.dtype == torch.bfloat16
    wide = cache.append(*tokens(1, 1 + 2**-12), capacity=9)
    assert wide.k.dtype == torch.float32 and column(wide) == [1, 1 + 2**-12]
    again = wide.append(*tokens(1, 3, torch.bfloat16), capacity=9)
    assert again.k.dtype == torch.float32 and again.k.data_ptr() == wide.k.data_ptr()
    half = map_state(lambda x: x.half() if x.is_floating_point() else x, again)
    assert half.append(*tokens(1, 4, torch.half)).k.dtype == torch.half


def test_a_state_made_without_gradients_is_continued_with_them_and_the_other_way() -> None:
    with torch.inference_mode():
        first = empty().append(*tokens(2, 1), capacity=9)
        first = first.append(*tokens(1, 2), capacity=9)
    with torch.no_grad():  # tensors of inference mode are not written outside of it
        second = first.append(*tokens(1, 3), capacity=9)
    k, v = (x.requires_grad_() for x in tokens(1, 4))
    third = second.append(k, v, capacity=9)
    product = (third.k * third.k.detach().exp()).sum() + third.v.square().sum()
    with torch.no_grad():
        assert column(second.append(*tokens(1, 5), capacity=9)) == [1, 1, 2, 3, 5]
        assert column(third.append(*tokens(1, 6), capacity=9)) == [1, 1, 2, 3, 4, 6]
    product.backward()
    assert torch.equal(v.grad, 2 * v) and torch.equal(k.grad, k.exp())
    assert column(third) == [1, 1, 2, 3, 4]


@torch.no_grad()
def test_threads_that_continue_one_state_at_once_get_their_own() -> None:
    states = [empty().append(*tokens(2, 1), capacity=9).append(*tokens(1, 2), capacity=9) for _ in range(50)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [(state, value) for state in states for value in range(3, 7)]
        run: Callable[..., KVCache] = lambda job: job[0].append(*tokens(1, job[1]), capacity=9)  # noqa: E731
        for (_, value), cache in zip(jobs, pool.map(torch.no_grad()(run), jobs), strict=True):
            assert column(cache) == [1, 1, 2, value]


@torch.no_grad()
def test_a_mapped_state_is_saved_without_the_memory_behind_it() -> None:
    cache = empty().append(*tokens(2, 1), capacity=10_000).append(*tokens(1, 2), capacity=10_000)
    saved = io.BytesIO()
    torch.save(map_state(torch.clone, cache), saved)
    assert saved.tell() < 10_000
    assert column(cache.append(*tokens(1, 3), capacity=10_000)) == [1, 1, 2, 3]


MIXERS: dict[str, Callable[[], torch.nn.Module]] = {
    "attention": lambda: Attention(12, 2),
    "fem-softmax": lambda: make_mixer("softmax"),
}


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_mixer_alone_does_not_copy_its_cache_for_every_token(name: str) -> None:
    mixer = MIXERS[name]()
    x = torch.randn(2, 40, mixer.d_model)
    whole, state, places, parts = mixer(x), mixer.init_state(2), set(), []
    for token in x.split(1, dim=1):
        y, state = mixer.step(token, state)
        parts.append(y)
        places.add(getattr(state, "prior", state).k.data_ptr())
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert len(places) <= 7
