"""`aggregate`: clients' factor pairs in, one `State` out. Values are checked here, once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .arguments import LEAST, MOST, check_settings, check_weights, kind, number, sequence, usable
from .batches import check_ranks, compare, directions, solve
from .bindings.ops import Aggregate
from .errors import Refusal, Refused, clean, require, unfit
from .packing import FLOATS
from .robust import CLIP, Verdict, judge
from .sources import Held, InMemory, Source
from .state import UNNAMED, Factors, State
from .state_report import notes
from .values import value_faults

__all__ = [
    "KEPT",
    "Client",
    "aggregate",
    "available",
    "check_factors",
    "names_of",
    "place_of",
    "scalings_of",
    "sources_of",
]

Client = Factors | Mapping[str, Factors] | Source
Progress = Callable[[int, int], None]
#: Settings that a state holds beside the rank, in this order.
KEPT = (
    "basis", "missing", "normalise", "tau_rel", "anchor", "oversample", "power_iters", "tol",
    "seed",
)  # fmt: skip


def aggregate(
    clients: Sequence[Client],
    weights: Sequence[float] | None = None,
    scalings: Sequence[float | Mapping[str, float]] | None = None,
    rank: int | str | None = None,
    *,
    captured: float = 0.9,
    basis: str = Aggregate.basis,
    missing: str = "zero",
    normalise: bool = True,
    names: Sequence[str] | None = None,
    robust: str | None = None,
    clip: float = CLIP,
    tau_rel: float = Aggregate.tau_rel,
    anchor: float = Aggregate.anchor,
    oversample: int = Aggregate.oversample,
    power_iters: int = Aggregate.power_iters,
    tol: float = Aggregate.tol,
    warm: State | None = None,
    seed: int = Aggregate.seed,
    max_bytes: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    client_statistics: bool = True,
    device: str | torch.device | None = None,
) -> State:
    """Aggregate LoRA updates s_i·B_i·A_i of K clients into one server state.

    Parameters
    ----------
    clients : sequence of (B, A), of mappings from module name to (B, A), or of sources
        B (d_out, r_i) and A (r_i, d_in) as PEFT stores them, fp32, bf16, fp16 or fp64; ranks may
        differ between clients and modules. Gradients are not recorded. NumPy arrays are copied
        into tensors. Factors on a GPU, all on one, stay there and are computed with there, and
        the state's ``u``, ``s`` and ``v`` are left there. A client may also be an object with
        ``modules`` and ``factors(module)`` (`glora_ops.sources.Source`), whose factors are read
        to the CPU when their module's turn comes and whose values are taken as checked.
    weights : sequence of float, optional
        How much each client counts, ≥ 0; equal by default. Normalised to sum 1.
    scalings : sequence of float, or of mappings from module name to float, optional
        alpha/r of each client (alpha/√r for rsLoRA), 0 or of modulus 1e-30 to 1e30; 1 by default.
    rank : int, "auto" or None
        Server rank R, at most 1024 or 16 times the directions that there can be in a module (Σ r_i,
        d_out or d_in), whichever is more: what lies beyond them is zero, and costs no work. None:
        twice the largest client rank. "auto": the smallest rank that holds
        the fraction `captured` of the mean update's energy; the ranks tried are recorded in
        ``state.settings["rank_to_captured"]``.
    captured : float
        Target of ``rank="auto"``, in (0, 1].
    basis : {"consensus", "projector", "update"}
        Whose coordinates: soft votes with an anchor (default), the published projector mean, or
        the leading singular vectors of the mean update (the least Frobenius error).
    missing : {"zero", "renormalise"}
        A client without a module counts as zero there, or is left out and the weights of the
        others are renormalised.
    normalise : bool
        False keeps the weights as they are; negative ones (task arithmetic) are allowed with
        ``basis="update"`` only.
    names : sequence of str, optional
        Of the clients, for messages and the report.
    robust : {"clip", "gate", "geometric-median"}, optional
        Against bad clients: one verdict per client from its norm and its signed cosines with the
        others over all modules, before anything is solved (docs/reliability.md). None by default.
        The verdict stands in ``state.settings["robust"]``; a client that is left out keeps its
        place, with weight 0.
    clip : float
        With `robust`: updates longer than this many median norms are shortened to it.
    tau_rel, anchor, oversample, power_iters, tol, seed
        As `torch.ops.glora.aggregate`.
    warm : State, optional
        Last round's state: its bases start the randomized iteration.
    max_bytes : int, optional
        Bytes of stacked factors that are in memory at a time, at least those of the largest module
        unless there is `scratch`. By default room for two of it, and for 8 MiB per thread. The
        solver's own 3(N + R + p)(d_out + d_in) numbers per module come on top, for as many batches
        of modules as there are threads.
    scratch : path, optional
        Folder on a disk (tmpfs is memory). A module whose factors exceed `max_bytes` is stacked
        in a nameless file there, and computed on through the system's cache of that file: the
        same bits, at the disk's speed where memory is short. Takes the stack as it is stored,
        and for bf16 and fp16 once more in fp32.
    progress : callable (done, total), optional
        Called in the calling thread after every batch of modules; with `robust` first after every
        module that is compared.
    client_statistics : bool
        False leaves out what is told of each client (norm, alignments, share), which a large
        ``basis="update"`` needs for nothing else; the state then says so where it is asked.
    device : str or torch.device, optional
        Where to compute, and where the state's bases are left: by default where the factors are.

    Returns
    -------
    State

    Raises
    ------
    GloraError
        No clients, arguments that do not fit. `Refused`, listing every offender at once, for
        factors that are misshapen or not finite and for bad weights and scalings.

    Warns
    -----
    GloraWarning
        The state holds much less than its rank could, a cut falls into a tie, or a client was left
        out by `robust`.

    Notes
    -----
    Equations: docs/mathematics.md, after arXiv 2605.06733. Cost per module: O(N d (R + p)) with
    N = Σ r_i; memory 3(N + R + p)(d_out + d_in) numbers. No d_out × d_in matrix exists.

    Modules of one shape and like ranks run together in batches of up to 8 MiB (`max_bytes`, if
    that is less), each on one thread and as many at a time as `torch.get_num_threads` says. The
    result is the same to the last bit for any number of threads; only a model of one batch, such
    as a single module, runs on all threads and may differ in its last digits. On a GPU batches
    hold up to 1 GiB and run one after another; ``power_iters`` chooses the mode (docs/ops.md).
    """
    clients = sequence("clients", clients, "a list with one (B, A), or one mapping, per client")
    count = len(clients)
    require(count >= 1, "clients", 0, "at least one client", "pass a list of (B, A) pairs")
    names = names_of(names, count)
    settings = check_settings(
        {
            "rank": rank, "captured": captured, "basis": basis, "missing": missing,
            "normalise": normalise, "tau_rel": tau_rel, "anchor": anchor,
            "oversample": oversample, "power_iters": power_iters, "tol": tol, "seed": seed,
            "max_bytes": max_bytes, "robust": robust, "clip": clip,
        }
    )  # fmt: skip
    require(
        warm is None or isinstance(warm, State), "warm", kind(warm), "a State or None",
        "glora.State.load reads one",
    )  # fmt: skip
    require(
        scratch is None or os.path.isdir(scratch), "scratch", repr(scratch), "an existing folder",
        "make it, or leave scratch out",
    )  # fmt: skip
    factor_weights = check_weights(weights, names, settings)
    sources = sources_of(clients, names)
    modules = list(dict.fromkeys(name for source in sources for name in source.modules))
    require(bool(modules), "clients", "clients without modules", "at least one module")
    scale = scalings_of(scalings, sources, names)
    place = place_of(sources, names) if device is None else available(device)
    # What can only be not finite is looked at in the stacks, which are in cache.
    later = place.type == "cpu" and not _holds_float64(sources)
    check_factors(sources, names, not later)
    check_ranks(sources, settings)
    judge_values = partial(check_factors, sources, names) if later else None

    largest = max(pair.rank for source in sources for pair in source.modules.values())
    wanted, target, max_bytes = (settings.pop(k) for k in ("rank", "captured", "max_bytes"))
    robust, clip = (settings.pop(k) for k in ("robust", "clip"))
    solver = {k: v for k, v in settings.items() if k not in ("missing", "normalise")}
    folder = None if scratch is None else os.fspath(scratch)
    if robust is not None:
        inner = compare(sources, modules, scale, max_bytes, folder, progress, place, judge_values)
        verdict = judge(robust, inner, factor_weights, clip)
        factor_weights, scale = _heeded(verdict, factor_weights, scale)
        settings["robust"] = verdict.record(names) | {"clip": clip}

    def run(server_rank: int, report: Progress | None) -> State:
        done = solve(
            sources, modules, factor_weights, scale, missing, max_bytes, folder, report, warm,
            place, judge_values, rank=server_rank, client_statistics=bool(client_statistics),
            **solver,
        )  # fmt: skip
        return State(
            {name: done[name] for name in modules},
            names,
            tuple(factor_weights),
            settings | {"rank": server_rank},
        )

    if wanted == "auto":
        state = _smallest_rank(run, target, sources, progress)
    else:
        state = run(wanted or 2 * largest, progress)
    for note in notes(state):
        if note.category is not None:
            warnings.warn(clean(note.text), note.category, stacklevel=2)
    return state


def _heeded(
    verdict: Verdict, weights: Sequence[float], scalings: Sequence[Mapping[str, float]]
) -> tuple[list[float], list[dict[str, float]]]:
    """Weights and scalings as a verdict changes them."""
    return (
        [w * trust for w, trust in zip(weights, verdict.trust, strict=True)],
        [
            {name: s * factor for name, s in of.items()}
            for of, factor in zip(scalings, verdict.scale, strict=True)
        ],
    )


def names_of(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"client {i}" for i in range(count))
    names = sequence("names", names, f"one per client, {count}")
    require(all(isinstance(name, str) for name in names), "names", names, "text")
    require(len(names) == count, "names", len(names), f"one per client, {count}")
    require(len(set(names)) == count, "names", names, "different names")
    return tuple(names)


def sources_of(clients: Sequence[Client], names: Sequence[str]) -> list[Source]:
    """Every client by module; what is neither tensor nor array is refused."""
    refusals = []
    out: list[Source] = []
    for name, client in zip(names, clients, strict=True):
        if isinstance(client, Source):
            out.append(client)
            continue
        pairs: dict[str, Held] = {}
        for module, pair in (client if isinstance(client, Mapping) else {UNNAMED: client}).items():
            whole = isinstance(pair, (tuple, list)) and len(pair) == 2
            b, a = (_tensor(x) for x in pair) if whole else (None, None)
            if b is None or a is None or not isinstance(module, str):
                found = ", ".join(type(x).__name__ for x in pair) if whole else kind(pair)
                refusals.append(
                    Refusal(
                        "not a factor pair",
                        client=name,
                        tensor=str(module) or None,
                        found=found,
                        expected="(B, A), tensors or NumPy arrays of fp32, bf16, fp16 or fp64, "
                        "under a module name that is text",
                        remedy="pass lora_B.weight and lora_A.weight themselves",
                    )
                )
            else:
                pairs[module] = Held(b, a)
        out.append(InMemory(pairs))
    if refusals:
        raise Refused(refusals)
    return out


def place_of(sources: Sequence[Source], names: Sequence[str]) -> torch.device:
    """Where all factors are; what is read when its turn comes is read to the CPU."""
    found: dict[torch.device, str] = {}
    for name, source in zip(names, sources, strict=True):
        if isinstance(source, InMemory):
            pairs = source.modules.values()
            found |= {x.device: name for pair in pairs for x in (pair.b, pair.a)}
        else:
            found[torch.device("cpu")] = name
    require(
        len(found) == 1,
        "clients",
        "factors on " + " and ".join(f"{device} ({name})" for device, name in found.items()),
        "all factors on one device",
        "move them first: x.to(device)",
    )
    return next(iter(found))


def available(device: str | torch.device) -> torch.device:
    """A device on which a tensor can be made."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        problem = str(error).partition("\n")[0]
        raise unfit(
            "device", f"{device!r} ({problem})", "a device that torch has here, such as cpu or cuda"
        ) from None
    return found


def _tensor(x: object) -> Tensor | None:
    if isinstance(x, np.ndarray):
        # A copy: arrays may be read-only, reversed, or in the other byte order.
        try:
            x = torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
        except TypeError:
            return None
    return x if isinstance(x, Tensor) and x.dtype in FLOATS else None


def scalings_of(
    scalings: Sequence[float | Mapping[str, float]] | None,
    sources: Sequence[Source],
    names: Sequence[str],
) -> list[dict[str, float]]:
    if scalings is None:
        scalings = [1.0] * len(sources)
    scalings = sequence("scalings", scalings, f"one per client, {len(sources)}")
    require(
        len(scalings) == len(sources), "scalings", len(scalings), f"one per client, {len(sources)}"
    )
    refusals: list[Refusal] = []
    out: list[dict[str, float]] = []
    shared: dict[tuple[int, int], tuple[dict[str, float], object, object]] = {}
    for given, source, name in zip(scalings, sources, names, strict=True):
        modules = source.modules
        same = shared.get((id(given), id(modules)))
        if same is not None:
            out.append(same[0])
            continue
        out.append({})
        known = len(refusals)
        for m in modules:
            s = given.get(m) if isinstance(given, Mapping) else given
            value = number(s)
            if value is None or not usable(value):
                lacking = isinstance(given, Mapping) and m not in given
                refusals.append(
                    Refusal(
                        "no scaling for a module of the client"
                        if lacking
                        else "scaling cannot be used",
                        client=name,
                        tensor=m or None,
                        found="" if lacking else repr(s),
                        expected="alpha/r of every module, or one number for all"
                        if lacking
                        else f"alpha/r, 0 or of modulus {LEAST} to {MOST}",
                    )
                )
            else:
                out[-1][m] = value
        if len(refusals) == known:
            shared[id(given), id(modules)] = out[-1], given, modules  # which keep their ids
    if refusals:
        raise Refused(refusals)
    return out


def _holds_float64(sources: Sequence[Source]) -> bool:
    held = (source for source in sources if isinstance(source, InMemory))
    pairs = (pair for source in held for pair in source.modules.values())
    return any(torch.float64 in (pair.b.dtype, pair.a.dtype) for pair in pairs)


def check_factors(sources: Sequence[Source], names: Sequence[str], values: bool = True) -> None:
    """Refuse, all at once, factors that are misshapen or hold a value that is not finite.

    Unless `values`, the latter only with the former.
    """
    refusals = []
    shapes: dict[str, tuple[str, int, int]] = {}
    held: list[tuple[str, str, Held]] = []
    for name, source in zip(names, sources, strict=True):
        if not isinstance(source, InMemory):
            continue
        for module, pair in source.modules.items():
            b, a = pair.b.shape, pair.a.shape
            if len(b) != 2 or len(a) != 2 or b[1] != a[0] or a[0] < 1:
                refusals.append(
                    Refusal(
                        "not a factor pair",
                        client=name,
                        tensor=module or None,
                        found=f"B {tuple(b)} and A {tuple(a)}",
                        expected="B (d_out, r) and A (r, d_in) with one r ≥ 1",
                    )
                )
                continue
            first, d_out, d_in = shapes.setdefault(module, (name, b[0], a[1]))
            if (b[0], a[1]) != (d_out, d_in):
                refusals.append(
                    Refusal(
                        "module has another shape",
                        client=name,
                        tensor=module or None,
                        found=f"B {tuple(b)} and A {tuple(a)}",
                        expected=f"d_out {d_out} and d_in {d_in} as {first}'s",
                        remedy="aggregate adapters of one base model",
                    )
                )
            held.append((name, module, pair))
    looked_at = [
        (name, f"{module}.{side}" if module else side, x.detach())
        for name, module, pair in (held if values or refusals else [])
        for side, x in (("B", pair.b), ("A", pair.a))
    ]
    faults = value_faults([x for *_, x in looked_at])
    for (name, tensor, _), fault in zip(looked_at, faults, strict=True):
        if fault is not None:
            problem, found, expected = fault
            refusals.append(
                Refusal(
                    problem,
                    client=name,
                    tensor=tensor,
                    found=found,
                    expected=expected,
                    remedy="leave the client out, or find out why its training diverged",
                )
            )
    if refusals:
        at = {name: i for i, name in enumerate(names)}
        raise Refused(sorted(refusals, key=lambda refusal: at[refusal.client or ""]))


def _smallest_rank(
    run: Callable[[int, Progress | None], State],
    captured: float,
    sources: Sequence[Source],
    progress: Progress | None,
) -> State:
    """Double the rank until the target is held, then bisect; the table of tries is recorded."""
    ceiling = directions(sources)
    target = min(captured, 1 - 1e-6)  # what fp32 factors can certify
    tried: dict[int, State] = {}

    def holds(r: int) -> bool:
        tried[r] = run(r, progress)
        return tried[r].captured >= target

    low, high = 0, 1
    while high < ceiling and not holds(high):
        low, high = high, min(2 * high, ceiling)
    if high not in tried and not holds(high):
        raise unfit(
            "captured",
            captured,
            f"at most {tried[high].captured:.6f}, what rank {high} holds: all directions there are",
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    state = tried[high]
    table = {str(r): tried[r].captured for r in sorted(tried)}
    state.settings.update(rank_to_captured=table, captured_target=captured)
    return state
