"""`aggregate`: clients' factor pairs in, one `State` out. Values are checked here, once."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import bindings  # noqa: F401  # registers torch.ops.glora
from .arguments import LEAST, MOST, check_settings, check_weights, kind, number, sequence, usable
from .errors import GloraWarning, Refusal, Refused, require, unfit
from .packing import FLOATS, pack_modules
from .report import notes
from .state import UNNAMED, Factors, ModuleState, State

__all__ = ["aggregate"]

Client = Factors | Mapping[str, Factors]
Progress = Callable[[int, int], None]


def aggregate(
    clients: Sequence[Client],
    weights: Sequence[float] | None = None,
    scalings: Sequence[float | Mapping[str, float]] | None = None,
    rank: int | str | None = None,
    *,
    captured: float = 0.9,
    basis: str = "consensus",
    missing: str = "zero",
    normalise: bool = True,
    names: Sequence[str] | None = None,
    tau_rel: float = 0.1,
    anchor: float = 1.0,
    oversample: int = 16,
    power_iters: int = -1,
    tol: float = 1e-3,
    warm: State | None = None,
    seed: int = 0,
    max_bytes: int = 2**28,
    progress: Progress | None = None,
) -> State:
    """Aggregate LoRA updates s_i·B_i·A_i of K clients into one server state.

    Parameters
    ----------
    clients : sequence of (B, A) or of mappings from module name to (B, A)
        B (d_out, r_i) and A (r_i, d_in) as PEFT stores them, fp32, bf16, fp16 or fp64; ranks may
        differ between clients and modules. Gradients are not recorded. NumPy arrays are copied
        into tensors.
    weights : sequence of float, optional
        How much each client counts, ≥ 0; equal by default. Normalised to sum 1.
    scalings : sequence of float, or of mappings from module name to float, optional
        alpha/r of each client (alpha/√r for rsLoRA), 0 or of modulus 1e-30 to 1e30; 1 by default.
    rank : int, "auto" or None
        Server rank R. None: twice the largest client rank. "auto": the smallest rank that holds
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
    tau_rel, anchor, oversample, power_iters, tol, seed
        As `torch.ops.glora.aggregate`.
    warm : State, optional
        Last round's state: its bases start the randomized iteration.
    max_bytes : int
        Factors stacked at a time; modules of one shape run together within it.
    progress : callable (done, total), optional
        Called after every batch of modules.

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
        The state holds much less than its rank could, or a cut falls into a tie.

    Notes
    -----
    Equations: docs/mathematics.md, after arXiv 2605.06733. Cost per module: O(N d (R + p)) with
    N = Σ r_i; memory 3(N + R + p)(d_out + d_in) numbers. No d_out × d_in matrix exists.
    """
    clients = sequence("clients", clients, "a list with one (B, A), or one mapping, per client")
    count = len(clients)
    require(count >= 1, "clients", 0, "at least one client", "pass a list of (B, A) pairs")
    names = _names(names, count)
    settings = check_settings(
        {
            "rank": rank, "captured": captured, "basis": basis, "missing": missing,
            "normalise": bool(normalise), "tau_rel": tau_rel, "anchor": anchor,
            "oversample": oversample, "power_iters": power_iters, "tol": tol, "seed": seed,
            "max_bytes": max_bytes,
        }
    )  # fmt: skip
    require(
        warm is None or isinstance(warm, State), "warm", kind(warm), "a State or None",
        "glora.State.load reads one",
    )  # fmt: skip
    factor_weights = check_weights(weights, names, settings)
    named = _factors(clients, names)
    modules = list(dict.fromkeys(name for client in named for name in client))
    require(bool(modules), "clients", "clients without modules", "at least one module")
    scale = _scalings(scalings, named, names)
    _check_values(named, names)

    largest = max(a.shape[0] for client in named for _, a in client.values())
    wanted, target, max_bytes = (settings.pop(k) for k in ("rank", "captured", "max_bytes"))
    solver = {k: v for k, v in settings.items() if k not in ("missing", "normalise")}

    def run(server_rank: int, report: Progress | None) -> State:
        done = _run(
            named, modules, factor_weights, scale, missing, max_bytes, report, warm,
            rank=server_rank, **solver,
        )  # fmt: skip
        return State(
            {name: done[name] for name in modules}, names, tuple(factor_weights),
            settings | {"rank": server_rank},
        )  # fmt: skip

    if wanted == "auto":
        state = _smallest_rank(run, target, named, progress)
    else:
        state = run(wanted or 2 * largest, progress)
    for note in notes(state):
        if note.warning:
            warnings.warn(note.text, GloraWarning, stacklevel=2)
    return state


def _names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"client {i}" for i in range(count))
    names = sequence("names", names, f"one per client, {count}")
    require(all(isinstance(name, str) for name in names), "names", names, "text")
    require(len(names) == count, "names", len(names), f"one per client, {count}")
    require(len(set(names)) == count, "names", names, "different names")
    return tuple(names)


def _factors(clients: Sequence[Client], names: Sequence[str]) -> list[dict[str, Factors]]:
    """Every client as a mapping of tensor pairs; what is neither tensor nor array is refused."""
    refusals = []
    out: list[dict[str, Factors]] = []
    for name, client in zip(names, clients, strict=True):
        pairs: dict[str, Factors] = {}
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
                pairs[module] = (b, a)
        out.append(pairs)
    if refusals:
        raise Refused(refusals)
    return out


def _tensor(x: object) -> Tensor | None:
    if isinstance(x, np.ndarray):
        # A copy: arrays may be read-only, reversed, or in the other byte order.
        try:
            x = torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
        except TypeError:
            return None
    return x if isinstance(x, Tensor) and x.dtype in FLOATS else None


def _scalings(
    scalings: Sequence[float | Mapping[str, float]] | None,
    clients: Sequence[Mapping[str, Factors]],
    names: Sequence[str],
) -> list[dict[str, float]]:
    if scalings is None:
        scalings = [1.0] * len(clients)
    scalings = sequence("scalings", scalings, f"one per client, {len(clients)}")
    require(
        len(scalings) == len(clients), "scalings", len(scalings), f"one per client, {len(clients)}"
    )
    refusals = []
    out: list[dict[str, float]] = []
    for given, client, name in zip(scalings, clients, names, strict=True):
        out.append({})
        for m in client:
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
    if refusals:
        raise Refused(refusals)
    return out


def _check_values(clients: Sequence[Mapping[str, Factors]], names: Sequence[str]) -> None:
    """Refuse, all at once, factors that are misshapen or hold a value that is not finite."""
    refusals = []
    shapes: dict[str, tuple[str, int, int]] = {}
    for name, client in zip(names, clients, strict=True):
        for module, (b, a) in client.items():
            found = f"B {tuple(b.shape)} and A {tuple(a.shape)}"
            if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0] or a.shape[0] < 1:
                refusals.append(
                    Refusal(
                        "not a factor pair",
                        client=name,
                        tensor=module or None,
                        found=found,
                        expected="B (d_out, r) and A (r, d_in) with one r ≥ 1",
                    )
                )
                continue
            first, d_out, d_in = shapes.setdefault(module, (name, b.shape[0], a.shape[1]))
            if (b.shape[0], a.shape[1]) != (d_out, d_in):
                refusals.append(
                    Refusal(
                        "module has another shape",
                        client=name,
                        tensor=module or None,
                        found=found,
                        expected=f"d_out {d_out} and d_in {d_in} as {first}'s",
                        remedy="aggregate adapters of one base model",
                    )
                )
            for side, x in (("B", b), ("A", a)):
                fault = _fault(x.detach())
                if fault:
                    problem, found, expected = fault
                    refusals.append(
                        Refusal(
                            problem,
                            client=name,
                            tensor=f"{module}.{side}" if module else side,
                            found=found,
                            expected=expected,
                            remedy="leave the client out, or find out why its training diverged",
                        )
                    )
    if refusals:
        raise Refused(refusals)


def _fault(x: Tensor) -> tuple[str, str, str] | None:
    """(problem, found, expected) of values that cannot be computed with."""
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        bad = (~torch.isfinite(x)).nonzero()
        if len(bad):
            found = f"{len(bad)} of {x.numel()}, the first at {bad[0].tolist()}"
            return "value is not finite", found, "finite numbers"
    if x.dtype == torch.float64:  # no other dtype reaches where squares over- or underflow
        peak = float(x.abs().max())
        if peak != 0 and not 1e-40 <= peak <= 1e40:
            return "values are too large or too small", f"{peak:.3g}", "moduli of 1e-40 to 1e40"
    return None


def _run(
    clients: Sequence[Mapping[str, Factors]],
    modules: Sequence[str],
    weights: Sequence[float],
    scalings: Sequence[Mapping[str, float]],
    missing: str,
    max_bytes: int,
    progress: Progress | None,
    warm: State | None,
    **settings: Any,
) -> dict[str, ModuleState]:
    """Modules of one shape and dtype together, batch by batch."""
    done: dict[str, ModuleState] = {}
    for batch in _batches(clients, modules, max_bytes):
        present = torch.tensor([[m in c for c in clients] for m in batch])
        w = torch.tensor(weights, dtype=torch.float64) * present
        if missing == "renormalise":
            w = w * (sum(weights) / w.sum(-1, keepdim=True).where(w.any(-1, keepdim=True), 1.0))
        s = torch.tensor(
            [[scale.get(m, 0.0) for scale in scalings] for m in batch], dtype=torch.float64
        )
        packed = pack_modules([[c.get(m) or _absent(clients, m) for c in clients] for m in batch])
        start = {} if warm is None else _warm(warm, batch)
        out = torch.ops.glora.aggregate(
            packed.b, packed.a, packed.offsets, w, s, **settings, **start
        )
        for l, m in enumerate(batch):
            done[m] = ModuleState(*(x[l] for x in (*out, present)))
        if progress is not None:
            progress(len(done), len(modules))
    return done


def _batches(
    clients: Sequence[Mapping[str, Factors]], modules: Sequence[str], max_bytes: int
) -> list[list[str]]:
    groups: dict[Any, list[str]] = defaultdict(list)
    for m in modules:
        pairs = [c[m] for c in clients if m in c]
        b, a = pairs[0]
        key = (b.shape[0], a.shape[1], *sorted({str(x.dtype) for pair in pairs for x in pair}))
        groups[key].append(m)
    batches = []
    for names in groups.values():
        rows = sum(max([c[m][1].shape[0] for m in names if m in c] or [1]) for c in clients)
        b, a = next(c[names[0]] for c in clients if names[0] in c)
        bytes_each = rows * (b.shape[0] * b.element_size() + a.shape[1] * a.element_size())
        size = max(1, max_bytes // bytes_each)
        batches += [names[k : k + size] for k in range(0, len(names), size)]
    return batches


def _absent(clients: Sequence[Mapping[str, Factors]], module: str) -> Factors:
    b, a = next(c[module] for c in clients if module in c)
    return b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])


def _warm(state: State, batch: Sequence[str]) -> dict[str, Tensor]:
    """Bases of an earlier state for a batch, where it knows every module of it."""
    if any(m not in state.modules for m in batch):
        return {}
    return {
        "warm_u": torch.stack([state.modules[m].u for m in batch]),
        "warm_v": torch.stack([state.modules[m].v for m in batch]),
    }


def _smallest_rank(
    run: Callable[[int, Progress | None], State],
    captured: float,
    clients: Sequence[Mapping[str, Factors]],
    progress: Progress | None,
) -> State:
    """Double the rank until the target is held, then bisect; the table of tries is recorded."""
    modules = {m for c in clients for m in c}
    ceiling = max(sum(c[m][1].shape[0] for c in clients if m in c) for m in modules)
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
