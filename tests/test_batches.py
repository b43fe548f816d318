"""Whole models: what runs together, how much at a time, and that nothing of it shows."""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import glora_ops as glora
from glora_ops import State, batches
from glora_ops.batches import BATCH_BYTES, PADDING, plan
from glora_ops.runtime.arena import LINE, Arena
from glora_ops.runtime.threads import workers
from glora_ops.values import value_faults

pytestmark = pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
SHAPES = {"q": (96, 80), "k": (64, 80), "up": (120, 96)}


def factors(seed: int, rank: int, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, rank, generator=rng), torch.randn(rank, d_in, generator=rng)


def model(layers: int = 5, clients: int = 3) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Clients whose ranks differ between clients, layers and modules; the last lacks a module."""
    out: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(clients)]
    for l in range(layers):
        for j, (name, shape) in enumerate(SHAPES.items()):
            for i, client in enumerate(out):
                rank = (2, 3, 8)[(l + i * j) % 3]
                client[f"{l}.{name}"] = factors(1000 * l + 10 * i + j, rank, *shape)
    del out[-1]["0.q"]
    return out


class Counting:
    """A client read module by module, that remembers what was read."""

    def __init__(self, held: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.modules = glora.api.sources_of([held], ["x"])[0].modules
        self.held, self.read = held, []

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        self.read.append(module)
        return self.held[module]


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test sets, the worker's own number returns."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Batches so small that the model takes many."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 40_000)
    return 40_000


def same(one: State, two: State) -> None:
    assert list(one.modules) == list(two.modules)
    for name, m in one.modules.items():
        for part, x in vars(m).items():
            assert torch.equal(x, getattr(two.modules[name], part)), (name, part)


def test_a_plan_holds_every_module_once_with_its_like() -> None:
    clients = model(layers=9)
    sources = [Counting(client) for client in clients]
    names = list(clients[0])
    for limit in (1, 30_000, 60_000, BATCH_BYTES):
        made = plan(sources, names, limit)
        assert sorted(name for batch in made for name in batch.modules) == sorted(names)
        assert [b.bytes for b in made] == sorted((b.bytes for b in made), reverse=True)
        for batch in made:
            assert len({name.partition(".")[2] for name in batch.modules}) == 1
            assert len(batch.modules) == 1 or batch.bytes <= limit
            ranks = [
                [c[name][0].shape[1] if name in c else 1 for c in clients] for name in batch.modules
            ]
            assert batch.rows == tuple(map(max, zip(*ranks, strict=True)))
            held = sum(map(sum, ranks))
            assert len(ranks) * sum(batch.rows) <= (1 + PADDING) * held
    assert not any(source.read for source in sources)


def test_a_plan_shares_modules_of_one_kind_out_evenly() -> None:
    """An even number of batches of one size, so that two threads end together."""
    clients = [{f"{l}.q": factors(l, 4, 96, 80) for l in range(40)} for _ in range(3)]
    sources, one = [Counting(client) for client in clients], 12 * (96 + 80) * 4
    for limit, sizes in ((40 * one, [40]), (39 * one, [20, 20]), (15 * one, [10] * 4)):
        made = plan(sources, list(clients[0]), limit)
        assert [len(batch.modules) for batch in made] == sizes
        # Parts of a job and of ranks are planned again where they are computed.
        assert all(plan(sources, batch.modules, limit) == [batch] for batch in made)


def test_modules_of_one_kind_share_a_batch() -> None:
    clients = [{f"{l}.q": factors(l, 4, 96, 80) for l in range(40)} for _ in range(3)]
    (batch,) = plan([Counting(client) for client in clients], list(clients[0]), BATCH_BYTES)
    assert len(batch.modules) == 40


def test_the_result_does_not_depend_on_threads_or_how_much_is_in_flight(
    threads: None, small: int
) -> None:
    clients = model()
    made = plan([Counting(client) for client in clients], list(clients[0]), small)
    assert len(made) > 6
    torch.set_num_threads(1)
    want = glora.aggregate(clients, weights=[3, 1, 2], rank=6)
    for batch in made:  # one after the other, by hand, on one thread
        assert len(batch.modules) * sum(batch.rows) > 0
        pairs = [
            [c.get(m) or (torch.zeros(batch.d_out, 1), torch.zeros(1, batch.d_in)) for c in clients]
            for m in batch.modules
        ]
        packed = glora.pack_modules(pairs)
        w = torch.tensor([[3.0, 1, 2]] * len(batch.modules), dtype=torch.float64) / 6
        for row, name in zip(w, batch.modules, strict=True):
            row *= torch.tensor([name in c for c in clients])
        s = torch.tensor([[1.0 * (m in c) for c in clients] for m in batch.modules]).double()
        u, sigma, v, *_ = torch.ops.glora.aggregate(packed.b, packed.a, packed.offsets, w, s, 6)
        for l, name in enumerate(batch.modules):
            assert torch.equal(want.modules[name].u, u[l])
            assert torch.equal(want.modules[name].s, sigma[l])
            assert torch.equal(want.modules[name].v, v[l])
    for count, room in ((2, None), (3, None), (2, 40_000), (5, 10**9)):
        torch.set_num_threads(count)
        same(glora.aggregate(clients, weights=[3, 1, 2], rank=6, max_bytes=room), want)
        assert torch.get_num_threads() == count


@pytest.mark.parametrize("max_bytes", [40_000, 90_000, None])
def test_no_more_is_stacked_than_was_allowed(
    threads: None, small: int, max_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of the stacks alive, counted where they are made and where they are freed."""
    torch.set_num_threads(2)
    alive, peak, lock = 0, 0, threading.Lock()
    plain = batches._stack

    def release(held: int) -> None:
        nonlocal alive
        with lock:
            alive -= held

    def counted(*arguments: object) -> list[Tensor]:
        nonlocal alive, peak
        stacks = plain(*arguments)
        for x in stacks[:2]:
            with lock:
                alive += x.nbytes
                peak = max(peak, alive)
            weakref.finalize(x, release, x.nbytes)
        return stacks

    monkeypatch.setattr(batches, "_stack", counted)
    clients = model(layers=8)
    glora.aggregate(clients, rank=4, max_bytes=max_bytes)
    largest = plan([Counting(c) for c in clients], list(clients[0]), small)[0].bytes
    assert 0 < peak <= (max_bytes or max(2 * largest, 3 * small))
    assert alive == 0


@pytest.mark.parametrize("stacks", [1, 2, 5])
def test_no_more_threads_work_than_may_have_a_stack(
    threads: None, stacks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another would wait for memory, and then keep a solver's freed memory of its own."""
    torch.set_num_threads(3)
    monkeypatch.setattr(batches, "BATCH_BYTES", 1)
    asked: list[int] = []

    def counted(count: int) -> AbstractContextManager[ThreadPoolExecutor]:
        asked.append(count)
        return workers(count)

    monkeypatch.setattr(batches, "workers", counted)
    clients = [{f"{l}": factors(10 * l + i, 4, 64, 64) for l in range(6)} for i in range(2)]
    glora.aggregate(clients, rank=4, max_bytes=stacks * 2 * 4 * (64 + 64) * 4)
    assert asked == [min(stacks, 3)]


def test_all_stacks_lie_in_one_block_of_memory_each_on_a_cache_line(
    threads: None, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What batches hand on need not be had from the system again; results have their own."""
    torch.set_num_threads(2)
    places: list[tuple[int, int]] = []
    plain = batches._stack

    def seen(*arguments: object) -> list[Tensor]:
        stacks = plain(*arguments)
        places.extend((x.untyped_storage().data_ptr(), x.data_ptr()) for x in stacks[:2])
        return stacks

    monkeypatch.setattr(batches, "_stack", seen)
    state = glora.aggregate(model(layers=8), rank=4)
    blocks, starts = zip(*places, strict=True)
    assert len(places) > 10
    assert len(set(blocks)) == 1
    assert len(set(starts)) < len(starts)
    assert not any(start % LINE for start in starts)
    assert all(m.u.untyped_storage().data_ptr() not in blocks for m in state.modules.values())


@pytest.mark.parametrize("robust", [None, "gate"])
def test_what_is_read_beside_the_workers_is_stacked_on_one_thread(
    threads: None, small: int, robust: str | None
) -> None:
    """A copy on two would wait at every end for a core that a worker has."""
    torch.set_num_threads(2)
    counts: set[int] = set()

    class Watching(Counting):
        def factors(self, module: str) -> tuple[Tensor, Tensor]:
            counts.add(torch.get_num_threads())
            return super().factors(module)

    glora.aggregate([Watching(client) for client in model()], rank=4, robust=robust)
    assert counts == {1}
    assert torch.get_num_threads() == 2


def test_an_arena_gives_the_first_gap_and_takes_it_back() -> None:
    arena = Arena(1000)
    one, two, three = arena.take(100), arena.take(300), arena.take(400)
    assert [x.storage_offset() for x in (one, two, three)] == [0, 128, 448]
    assert arena.take(200) is None
    arena.give_back(two)
    assert arena.take(321) is None
    assert arena.take(320).storage_offset() == 128
    arena.give_back(three)
    assert arena.take(552).storage_offset() == 448
    arena.give_back(one)
    assert arena.take(100).storage_offset() == 0


def test_every_module_of_a_source_is_read_once(small: int) -> None:
    clients = model()
    sources = [Counting(client) for client in clients]
    same(glora.aggregate(sources, rank=5), glora.aggregate(clients, rank=5))
    for source, client in zip(sources, clients, strict=True):
        assert sorted(source.read) == sorted(client)


def test_a_failure_stops_the_rest_and_leaves_nothing_behind(threads: None, small: int) -> None:
    torch.set_num_threads(2)
    before = threading.active_count()

    class Failing(Counting):
        def factors(self, module: str) -> tuple[Tensor, Tensor]:
            if len(self.read) == 3:
                raise OSError("the disk is gone")
            return super().factors(module)

    with pytest.raises(OSError, match="the disk is gone"):
        glora.aggregate([Failing(client) for client in model()], rank=4)
    with pytest.raises(ZeroDivisionError):
        glora.aggregate(model(), rank=4, progress=lambda done, total: 1 // 0)
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2


def test_progress_is_told_in_the_calling_thread(small: int) -> None:
    seen = []
    glora.aggregate(
        model(), rank=4, progress=lambda *call: seen.append((*call, threading.get_ident()))
    )
    assert {ident for _, _, ident in seen} == {threading.get_ident()}
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][:2] == (15, 15)


def test_callers_may_be_threads_themselves(threads: None, small: int) -> None:
    """Every caller gets the bits it gets alone, and every setting is as it was."""
    torch.set_num_threads(2)
    clients = model(layers=3)
    want = glora.aggregate(clients, rank=4)
    single = glora.aggregate([c["1.up"] for c in clients], rank=4)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    found: list[tuple[State, State, int, int]] = []

    def call(count: int) -> None:
        torch.get_num_threads()  # without a first look, torch lets other threads change it
        torch.set_num_threads(count)
        for _ in range(3):
            state = glora.aggregate(clients, rank=4)
        alone = glora.aggregate([c["1.up"] for c in clients], rank=4)
        found.append((state, alone, count, torch.get_num_threads()))

    callers = [threading.Thread(target=call, args=(count,)) for count in (2, 1, 3, 2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    for state, alone, given, after in found:
        same(state, want)
        assert given == after
        if given == 2:
            same(alone, single)
    assert torch.get_num_threads() == 2
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_workers_compute_on_one_thread_and_change_nobody_elses(threads: None) -> None:
    torch.set_num_threads(3)
    with workers(4) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(40))) == {1}
        assert torch.get_num_threads() == 3
        # A worker's own calls leave the number alone that new threads begin with.
        pairs = [factors(i, 2, 20, 30) for i in range(3)]
        pool.submit(glora.aggregate, pairs, rank=4).result()
        fresh: list[int] = []
        newcomer = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        newcomer.start()
        newcomer.join()
        assert fresh == [3]
    assert torch.get_num_threads() == 3


class Elsewhere(TorchDispatchMode):
    """Meta tensors stand for a GPU's; whatever comes back to the CPU has one value."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value
        self.back: list[int] = []
        self.steps: list[dict[str, object]] = []
        self.called: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        self.called.add(str(func))
        away = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if name.startswith("aggregate"):
            names = [argument.name for argument in func._schema.arguments]
            self.steps.append(dict(zip(names, args, strict=False)) | kwargs)
        if away and name.startswith("_to_copy") and str(kwargs.get("device")) == "cpu":
            self.back.append(args[0].numel())
            return torch.full(args[0].shape, self.value, dtype=args[0].dtype)
        return func(*args, **kwargs)


def test_factors_elsewhere_stay_there() -> None:
    """Stacks, bases, a warm start read from a file and readouts; certificates come to the CPU."""
    clients = model()
    known = glora.aggregate(clients, rank=4)
    away = [{m: (b.to("meta"), a.to("meta")) for m, (b, a) in c.items()} for c in clients]
    with Elsewhere() as mode:
        state = glora.aggregate(away, rank=4, warm=known)
        readouts = state.readout(2)
        state.report()
    for step in mode.steps:
        assert all(step[name].is_meta for name in ("b", "a", "warm_u", "warm_v"))
        assert step["offsets"].is_cpu
    for name, m in state.modules.items():
        bases = {part for part, x in vars(m).items() if x.is_meta}
        assert bases == {"u", "s", "v"}
        assert all(x.is_meta for x in readouts[name])
    # The extent of every factor; eigenvalues, stats and client stats of each module; no more.
    pairs = sum(len(client) for client in clients)
    assert sum(mode.back) == 2 * 2 * pairs + len(state.modules) * (2 * 20 + 16 + 3 * 4)


def test_values_in_memory_are_looked_at_in_the_stacks(
    threads: None, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice a batch, where they are in cache; only what is wrong asks for every tensor."""
    torch.set_num_threads(2)
    looks: list[int] = []
    plain = batches.is_finite
    monkeypatch.setattr(batches, "is_finite", lambda x: bool(looks.append(1)) or plain(x))
    clients = model()
    with Elsewhere() as mode:  # sees the calling thread alone
        glora.aggregate(clients, rank=4)
    assert "aten.aminmax.default" not in mode.called
    assert len(looks) == 2 * len(plan([Counting(c) for c in clients], list(clients[0]), small))
    clients[1]["4.up"][0][3, 1], clients[2]["2.k"][1][0, 5] = math.nan, -math.inf
    for robust in (None, "gate"):
        with pytest.raises(glora.Refused) as refused:
            glora.aggregate(clients, rank=4, robust=robust)
        found = [(refusal.client, refusal.tensor) for refusal in refused.value.refusals]
        assert found == [("client 1", "4.up.B"), ("client 2", "2.k.A")]


def test_values_are_judged_with_one_call_a_tensor() -> None:
    """Whatever a dispatch costs, a model has thousands of tensors."""

    class Calls(TorchDispatchMode):
        names: list[str]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    counts = []
    for clients in (2, 5):
        pairs = [x for i in range(clients) for x in factors(i, 2, 9, 8)]
        with Calls() as calls:
            calls.names = []
            assert value_faults(pairs) == [None] * len(pairs)
        counts.append(len(calls.names))
    assert counts[1] - counts[0] == 2 * 3
    pairs[3][1, 2], pairs[7][0, 0] = math.nan, -math.inf
    found = [i for i, fault in enumerate(value_faults(pairs)) if fault is not None]
    assert found == [3, 7]


@pytest.mark.parametrize("value", [2.0**101, -(2.0**-101)])
def test_what_a_gpu_cannot_scale_is_refused_there(value: float) -> None:
    pair = factors(0, 2, 9, 8)
    assert glora.aggregate([tuple(x * 2.0**101 for x in pair)]).captured > 0.999
    with Elsewhere(value), pytest.raises(glora.Refused, match="for a GPU"):
        glora.aggregate([tuple(x.to("meta") for x in pair)])


def test_factors_in_two_places_are_refused() -> None:
    one, two = factors(0, 2, 9, 8), tuple(x.to("meta") for x in factors(1, 2, 9, 8))
    with pytest.raises(glora.GloraError, match=r"cpu \(client 0\) and meta \(client 1\)"):
        glora.aggregate([one, two])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_arena_returns_what_no_later_batch_needs() -> None:
    arena = Arena(2**23)
    low, high = arena.take(2**20), arena.take(2**22)
    low.fill_(1)
    high.fill_(2)
    arena.keep(2**20)
    assert bool((high == 2).all())
    arena.give_back(high)
    full = resident()
    arena.keep(2**20)
    assert resident() <= full - 2**22 + 2**19
    assert bool((low == 1).all())
    assert arena.take(2**22).count_nonzero() == 0


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
