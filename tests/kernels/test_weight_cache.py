"""The cache of transformed weights: never stale, bounded, and freed with what it serves."""

import copy
import gc
import mmap
import pickle
import threading
from collections import Counter

import pytest
import torch
from torch.nn.utils import parametrize

from ifr_fast import Broyden, Implicit, weight_cache
from ifr_fast.kernels import winograd
from ifr_fast.kernels.weight_cache import DEFAULT_LIMIT, large_pages, transformed
from ifr_fast.kernels.winograd import _transform

ENTRY = (36 + 9) * 32 * 32 * 4  # bytes, of a weight of 32 channels: the transformed one and a copy


@pytest.fixture(autouse=True)
def empty():
    gc.disable()  # a block that another test has left behind would empty the cache at any time
    weight_cache.clear()
    yield
    gc.enable()
    weight_cache.set_limit(DEFAULT_LIMIT)
    weight_cache.clear()


@pytest.fixture
def transforms(monkeypatch):
    """Counts how often weights are transformed."""
    count = Counter()

    def counted(weight, transposed, out):
        count[transposed] += 1
        _transform(weight, transposed, out)

    monkeypatch.setattr(winograd, "_transform", counted)
    return count


def weight(channels=32):
    return torch.randn(channels, channels, 3, 3)


def is_kept(weight):
    made = []
    transformed(weight, False, lambda *args: made.append(args) or _transform(*args))
    return not made


def use(*weights, transposed=False):
    return [transformed(w, transposed, _transform) for w in weights]


@pytest.fixture
def head(make_head):
    return make_head(32, convolution="winograd", solver=Broyden(3, rtol=0.0), adjoint=Implicit(3, rtol=0.0))


def x():
    return torch.randn(2, 32, 6, 5)


def fresh(head, x):
    """What the head gives if nothing is kept."""
    weight_cache.clear()
    return head(x)


# What changes weights, in which nothing but the contents tells of it.


def by_optimizer(head):
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    head(x()).square().sum().backward()
    optimizer.step()


def by_data_copy(head):
    for p in head.parameters():
        p.data.copy_(p.data + 0.1 * torch.randn_like(p))


def by_last_element(head):
    """Of the weights, which differ nowhere else."""
    for conv in (head.block.conv1, head.block.conv2):
        conv.parametrizations.weight.original1.data[-1, -1, -1, -1] += 0.5


def by_exchange_of_data(head):
    """As an average of the weights takes the place of the weights."""
    for p in head.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)


def by_load_state_dict(head):
    head.load_state_dict({name: t + 0.1 * torch.randn_like(t) for name, t in head.state_dict().items()})


def by_gain(head):
    head.block.conv1.parametrizations.weight.original0.data.mul_(1.5)


def by_numpy(head):
    head.block.conv2.parametrizations.weight.original1.detach().numpy()[3, 4] *= 2


def by_removal_of_weight_norm(head):
    for conv in (head.block.conv1, head.block.conv2):
        parametrize.remove_parametrizations(conv, "weight")
    head.block.conv1.weight.data[5] *= 2


CHANGES = [
    by_optimizer, by_data_copy, by_last_element, by_exchange_of_data, by_load_state_dict, by_gain, by_numpy,
    by_removal_of_weight_norm,
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_seen(change, training, head):
    features = x().requires_grad_(training)

    def run(head):
        y = head(features)
        grads = torch.autograd.grad(y.sum(), [features, *head.parameters()]) if training else []
        return [y, *grads]

    for _ in range(2):
        before = run(head)
    change(head)
    head.zero_grad()
    actual = run(head)
    weight_cache.clear()
    for a, e in zip(actual, run(head), strict=True):
        assert torch.equal(a, e)
    assert not torch.equal(actual[0], before[0])


def test_weights_that_change_back_and_forth(head):
    """As an average's weights take turns with the weights that are trained."""
    features, own = x(), [p.data.clone() for p in head.parameters()]
    averaged = [p + 0.1 * torch.randn_like(p) for p in own]
    expected = []
    for values in (own, averaged):
        for p, value in zip(head.parameters(), values, strict=True):
            p.data.copy_(value)
        expected.append(fresh(head, features))
    for _ in range(2):
        for values, result in zip((own, averaged), expected, strict=True):
            for p, value in zip(head.parameters(), values, strict=True):
                p.data.copy_(value)
            assert torch.equal(head(features), result)


def test_a_hit_transforms_nothing(head, transforms):
    features = x().requires_grad_()
    for _ in range(3):
        head(features).sum().backward()
    assert transforms == {False: 2, True: 2}
    head.eval()
    with torch.no_grad():
        head(features)
        copy.deepcopy(head)(features.contiguous(memory_format=torch.channels_last))
    assert transforms == {False: 2, True: 2}
    weight_cache.set_limit(0)
    head(features)
    head(features)
    assert transforms == {False: 6, True: 2}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -0.0])
def test_weights_that_are_not_finite_are_kept_once(bad, transforms):
    w = weight()
    w[0, 0, 1, 1] = w[3, 4, 0, 0] = bad
    for _ in range(5):
        winograd.Winograd().convolution(w.clone(), x())
    assert weight_cache.size() == ENTRY
    assert transforms == {False: 1}


def test_weights_that_begin_alike_are_told_apart():
    """Such as pruned ones: all zero in the first kernel."""
    a, features = weight(), x()
    b = a.clone()
    b[31, 31, 2, 2] += 1
    ya, yb = (torch.nn.functional.conv2d(features, w, padding=1) for w in (a, b))
    for w, expected in ((a, ya), (b, yb), (a, ya), (b.clone(), yb), (a.clone(), ya)):
        y = winograd.Winograd().convolution(w, features)(features)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-2)


def test_shapes_and_directions_are_told_apart():
    w = torch.zeros(32, 64, 3, 3)
    for shape in ((32, 64), (64, 32), (64, 64)):
        for transposed in (False, True):
            made = transformed(w.new_zeros(*shape, 3, 3), transposed, _transform)
            assert made.numel() == 36 * shape[0] * shape[1]
    assert weight_cache.size() == 2 * 45 * 4 * (32 * 64 + 64 * 32 + 64 * 64)


def test_what_is_kept_does_not_change_with_the_weight():
    w = weight()
    (kept,) = use(w)
    copied = kept.clone()
    w.mul_(2)
    assert not is_kept(w)
    weight_cache.clear()  # who holds the memory keeps it
    assert torch.equal(kept, copied)


def test_size_and_clear():
    assert weight_cache.size() == 0
    w = weight()
    use(w, weight(), w)
    assert weight_cache.size() == 2 * ENTRY
    use(w, transposed=True)
    assert weight_cache.size() == 3 * ENTRY
    weight_cache.clear()
    assert weight_cache.size() == 0


def test_a_block_takes_what_is_said():
    """360·C² bytes a direction."""
    channels = 64
    use(weight(channels), weight(channels))
    assert weight_cache.size() == 360 * channels**2


def test_the_limit_drops_what_was_used_longest_ago():
    weight_cache.set_limit(3 * ENTRY)
    a, b, c, d = (weight() for _ in range(4))
    use(a, b, c, a, d)
    assert weight_cache.size() == 3 * ENTRY
    assert is_kept(a)
    assert is_kept(c)
    assert is_kept(d)
    assert not is_kept(b)
    weight_cache.set_limit(ENTRY)  # b was used last
    assert weight_cache.size() == ENTRY
    assert is_kept(b)
    weight_cache.set_limit(ENTRY - 1)
    assert weight_cache.size() == 0


@pytest.mark.parametrize("limit", [0, 1, ENTRY - 1])
def test_a_limit_below_one_weight_keeps_nothing(limit, head):
    features = x()
    expected = head(features)
    weight_cache.set_limit(limit)
    assert weight_cache.size() == 0
    assert torch.equal(head(features), expected)
    assert weight_cache.size() == 0


@pytest.mark.parametrize("limit", [-1, 1.5, "1", None, True, torch.tensor(1)])
def test_wrong_limits(limit):
    use(weight())
    with pytest.raises(ValueError, match=r"^limit="):
        weight_cache.set_limit(limit)
    assert weight_cache.size() == ENTRY


def itself(head):
    return head


@pytest.mark.parametrize(
    "clone", [itself, copy.deepcopy, copy.copy, lambda h: pickle.loads(pickle.dumps(h))],
    ids=["itself", "deepcopy", "copy", "pickle"],
)  # fmt: skip
def test_freed_with_the_block(clone, make_head):
    head = make_head(32, convolution="winograd", solver=Broyden(1), weight_norm=False)
    other = clone(head)
    del head
    gc.collect()
    other(x())
    assert weight_cache.size() == 2 * ENTRY
    del other
    gc.collect()
    assert weight_cache.size() == 0


def test_a_collection_of_garbage_amid_a_count(monkeypatch):
    """It may end a block, which empties the cache that is counted."""
    use(weight(), weight())
    monkeypatch.setattr(weight_cache.Entry, "bytes", property(lambda entry: weight_cache.clear() or ENTRY))
    weight_cache.size()
    use(weight(), weight())


def test_inference_mode_leaves_usable_entries(head):
    features = x()
    with torch.inference_mode():
        expected = head(features)
    assert torch.equal(head(features).detach(), expected)
    head(features).sum().backward()


def test_memory_that_nobody_uses_is_given_again():
    weight_cache.clear()
    rooms = [weight_cache.large_pages(count) for count in (3 << 20, 3 << 20, 2 << 20)]
    places = [room.data_ptr() for room in rooms]
    assert len(set(places)) == 3
    del rooms[0]
    rooms += [weight_cache.large_pages(3 << 20) for _ in range(2)]
    assert rooms[2].data_ptr() == places[0]
    assert rooms[3].data_ptr() not in places
    del rooms
    assert 0 < sum(map(len, weight_cache._free)) <= weight_cache.MOST_FREE
    weight_cache.clear()
    assert not weight_cache._free


def test_weights_in_use_outlive_their_entry():
    weight_cache.set_limit(ENTRY)
    (first,) = use(weight())
    held = first.clone()
    use(*(weight() for _ in range(3)))
    assert torch.equal(first, held)


def test_threads():
    """They use a few weights in turn, while others drop them."""
    weights, failures = [weight() for _ in range(6)], []
    expected = [torch.empty(4 * w.numel()) for w in weights]
    for w, out in zip(weights, expected, strict=True):
        _transform(w, False, out)
    weight_cache.set_limit(4 * ENTRY)

    def work(seed):
        try:
            for i in range(60):
                j = (seed * 5 + i * (seed + 1)) % 6
                assert torch.equal(transformed(weights[j], False, _transform), expected[j])
                assert weight_cache.size() <= 4 * ENTRY
                if i % 20 == 19:
                    weight_cache.clear()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("count", [0, 1, 1000, (2 << 20) // 4 - 1, (2 << 20) // 4, (5 << 20) + 3])
def test_large_pages(count):
    memory = large_pages(count)
    assert memory.dtype == torch.float32
    assert memory.numel() == count
    memory.fill_(3)
    assert memory.sum(dtype=torch.float64) == 3 * count
    if 4 * count >= 2 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
        assert memory.data_ptr() % (2 << 20) == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages")
def test_a_kernel_without_large_pages(monkeypatch):
    """Linux without transparent huge pages refuses the advice."""

    class Memory(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Memory)
    memory = large_pages(1 << 20)
    memory.fill_(3)
    assert memory.sum(dtype=torch.float64) == 3 << 20


def test_defaults_of_torch_change_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            memory = large_pages(10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert memory.dtype == torch.float32
    assert memory.is_cpu
