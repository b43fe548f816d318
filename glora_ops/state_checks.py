"""Checks of a state's tensors: what has to be there, of which shapes, dtypes and sizes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from .adapters.modules import FACTOR_DTYPES
from .adapters.safetensors_header import TensorInfo
from .certificates import CLIENT_STATS, FROM_CLIENTS, STATS
from .errors import Refusal

__all__ = ["misplaced", "tensor_names", "wrong_values"]

#: Tensors of a module, named as in `ModuleState`.
PARTS = ("u", "s", "v", "eig_u", "eig_v", "stats", "client_stats", "present")
#: Sizes that fp64 can square; what may be aggregated stays far below.
LARGEST = 1e150

Fault = tuple[str, str, str]  # part, found, expected


def tensor_names(module: str) -> dict[str, str]:
    """Names in the file of the tensors of a module, by part."""
    return {part: f"modules/{module}/{part}" for part in PARTS}


def misplaced(
    modules: Collection[str], clients: int, rank: int, tensors: Mapping[str, Tensor | TensorInfo]
) -> Iterator[Refusal]:
    """Tensors that are missing, belong nowhere, or are of another dtype or shape."""
    wanted = {name for module in modules for name in tensor_names(module).values()}
    for name in sorted(wanted - tensors.keys()):
        yield Refusal("a tensor is missing", tensor=name, expected="all tensors of every module")
    for name in sorted(tensors.keys() - wanted):
        if not name.startswith("dense/"):
            yield Refusal("the tensor belongs to no module", tensor=name)
    for module in modules:
        names = tensor_names(module)
        if tensors.keys() >= set(names.values()):
            found = {part: tensors[name] for part, name in names.items()}
            for part, shown, expected in _misfits(found, clients, rank):
                yield Refusal("the tensor does not fit", None, None, names[part], shown, expected)


def _misfits(m: Mapping[str, Tensor | TensorInfo], clients: int, rank: int) -> Iterator[Fault]:
    sizes = {"s": rank, "stats": len(STATS), "present": clients}
    for part, x in m.items():
        shape, dtype, wanted = tuple(x.shape), torch.float64, ""
        if part in ("u", "v"):
            dtype = m["u"].dtype
            fits = len(shape) == 2 and shape[0] >= 1 and shape[1] == rank
            fits = fits and dtype in FACTOR_DTYPES
            wanted = f"(d, {rank}) of one floating dtype for u and v"
        elif part in ("eig_u", "eig_v"):
            fits = len(shape) == 1 and shape[0] >= rank
            wanted = f"(at least {rank},) of {dtype}"
        else:
            dtype = torch.bool if part == "present" else dtype
            whole = (clients, len(CLIENT_STATS)) if part == "client_stats" else (sizes[part],)
            fits = shape == whole or (part == "client_stats" and shape == (0, len(CLIENT_STATS)))
            wanted = f"{whole} of {dtype}"
        if not fits or x.dtype != dtype:
            yield part, f"{shape} of {x.dtype}", wanted


def wrong_values(modules: Collection[str], tensors: Mapping[str, Tensor]) -> Iterator[Refusal]:
    """Values that no state has, in tensors that are where they should be."""
    for module in modules:
        names = tensor_names(module)
        for part, found, expected in _faults({p: tensors[n] for p, n in names.items()}):
            yield Refusal("values that no state has", None, None, names[part], found, expected)
    for name, x in tensors.items():
        if not name.startswith("dense/"):
            continue
        compared = x.float() if x.dtype.itemsize == 1 else x  # torch tests no float8
        if not bool(compared.isfinite().all()):
            yield Refusal("values are not finite", tensor=name, expected="finite numbers")


def _faults(m: Mapping[str, Tensor]) -> Iterator[Fault]:
    """What no module of a state has."""
    s, clients = m["s"], len(m["present"])
    if int(m["present"].view(torch.uint8).max()) > 1:
        yield "present", "bytes other than 0 and 1", "truth values"
    for part in ("s", "eig_u", "eig_v", "client_stats"):
        largest = float(m[part].abs().amax()) if m[part].numel() else 0.0
        if not largest <= LARGEST:
            yield part, f"a modulus of {largest:g}", f"finite numbers up to {LARGEST:g}"
    if not bool((s.diff() <= 0).all()) or not bool(s[-1] >= 0):
        yield "s", "values that ascend or are negative", "descending values ≥ 0"
    if bool((m["client_stats"][:, 0] < 0).any()):
        yield "client_stats", "a negative norm", "norms ≥ 0"
    for part in ("u", "v"):
        yield from _not_orthonormal(part, m[part], s > 0)
    unknown = () if len(m["client_stats"]) else FROM_CLIENTS
    yield from _wrong_stats(m["stats"], clients, int((s > 0).sum()), unknown)


def _not_orthonormal(part: str, x: Tensor, alive: Tensor) -> Iterator[Fault]:
    """Columns (d, R) that are not orthonormal where `alive`, or not zero elsewhere.

    A column is U·x_k: d terms were summed to make the basis orthonormal, R terms in its product,
    and each entry is rounded, so that inner products are off by a few u·(R + √d). Measured over
    4 000 problems of all bases, routes and dtypes: at most a tenth of the bound.
    """
    if bool(x[:, ~alive].any()):
        yield part, "entries in columns without a singular value", "zeros there"
    d, rank = x.shape
    limit = 4 * torch.finfo(x.dtype).eps * (rank + math.sqrt(d))
    gram = x.double().mT @ x.double()
    error = float((gram - torch.diag(alive.double())).abs().max())
    if not error <= limit:  # NaN and infinity end here as well
        yield part, f"inner products off by {error:.1e}", f"orthonormal columns, to {limit:.1e}"


# The most that each of `STATS` may be; the least is 0. NaN is refused: whoever lets `aggregate`
# leave some of them out admits it here.
_MOST = {
    **dict.fromkeys(("captured", "attainable", "gap_u", "gap_v", "gap_w", "ambiguous"), 1.0),
    **dict.fromkeys(("norm", "storage_scale"), LARGEST),
    **dict.fromkeys(("kappa_p", "kappa_w", "rho_max"), math.inf),
    **dict.fromkeys(("power_iters", "iterative"), 2.0**31),
}
_COUNTS = ("voices", "ambiguous", "info_limited", "effective_rank", "power_iters", "iterative")


def _wrong_stats(
    stats: Tensor, clients: int, rank: int, unknown: Collection[str]
) -> Iterator[Fault]:
    """`rank` is the number of singular values above zero; what is unknown may be NaN."""
    told = dict(zip(STATS, stats.tolist(), strict=True))
    most = _MOST | {"voices": clients, "info_limited": clients, "effective_rank": rank}
    for name, value in told.items():
        if math.isnan(value) and name in unknown:
            continue
        if not 0 <= value <= most[name] or (name in _COUNTS and value != int(value)):
            kind = "an integer" if name in _COUNTS else "a number"
            yield "stats", f"{name} {value:g}", f"{kind} from 0 to {most[name]:g}"
    if told["captured"] > told["attainable"]:
        yield "stats", "captured above attainable", "captured ≤ attainable"
    if told["effective_rank"] < rank:
        yield "stats", f"effective_rank {told['effective_rank']:g}", f"{rank}, as s has"
