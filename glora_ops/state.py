"""The server state: what an aggregation leaves behind, and what adapters are read out of."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .arguments import integer, number
from .certificates import CLIENT_STATS, FROM_CLIENTS, STATS
from .errors import require, unfit

__all__ = ["FORMAT_VERSION", "Factors", "ModuleState", "State"]

FORMAT_VERSION = 2  # 1 had no record
Factors = tuple[Tensor, Tensor]

_STATE_FILE = "a server.safetensors"
_WRITES = "glora aggregate writes one, and State.save"

_REMEDY = "aggregate again, or call torch.ops.glora.client_stats with the factors"
#: Name of the module of a state that was made from bare factor pairs.
UNNAMED = ""


@dataclass(frozen=True, eq=False)
class ModuleState:
    """One module's update Ŵ = u · diag(s) · vᵀ with its certificates.

    Attributes
    ----------
    u : Tensor (d_out, R)
    s : Tensor (R,) fp64
        Descending; zero, with zero columns, beyond the effective rank.
    v : Tensor (d_in, R)
    eig_u, eig_v : Tensor (R + oversample,) fp64
        Consensus eigenvalues on both sides; for ``basis="update"`` singular values of W̄.
    stats : Tensor (16,) fp64
        `glora_ops.certificates.STATS`.
    client_stats : Tensor (K, 4) fp64
        `glora_ops.certificates.CLIENT_STATS`; (0, 4) of a state made without them.
    present : Tensor (K,) bool
        Which clients had the module.

    Notes
    -----
    u, s and v are where the factors were, the rest on the CPU.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    eig_u: Tensor
    eig_v: Tensor
    stats: Tensor
    client_stats: Tensor
    present: Tensor

    def stat(self, name: str) -> float:
        """One certificate by its name in `STATS`."""
        require(
            self.tells_of_clients or name not in FROM_CLIENTS or not self.stats.isnan().any(),
            name, "none", "a state made with client_statistics", _REMEDY,
        )  # fmt: skip
        return float(self.stats[STATS.index(name)])

    def client_stat(self, name: str) -> Tensor:
        """(K,): one column of `client_stats` by its name in `CLIENT_STATS`."""
        require(self.tells_of_clients, name, "none", "a state made with client_statistics", _REMEDY)
        return self.client_stats[:, CLIENT_STATS.index(name)]

    @property
    def tells_of_clients(self) -> bool:
        """Whether per-client statistics were computed."""
        return len(self.client_stats) > 0

    @property
    def update(self) -> Factors:
        """Ŵ as factors (u·diag(s) (d_out, R), vᵀ (R, d_in)); never a dense matrix."""
        return self.u * self.s.to(self.u.dtype), self.v.mT


_TENSORS = tuple(ModuleState.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class State:
    """The server's model of all clients: an update per module, of rank R, with certificates.

    Attributes
    ----------
    modules : dict of str to ModuleState
        A state made from bare pairs has one module named ``""``.
    clients : tuple of str
    weights : tuple of float
        As used: normalised to sum 1 unless ``normalise=False``.
    settings : dict
        How it was made: rank, basis, seed, …; JSON-able.
    dense : dict of str to Tensor
        Weighted means of full tensors (classifier heads, modules_to_save).
    layout : dict or None
        What is needed to write PEFT folders; JSON-able.
    record : dict or None
        Of a state made from PEFT folders: the ``arguments`` and, for each of its ``clients``,
        name, path (absolute here, relative to the state in its file), weight as given, size and
        SHA-256 of the tensor file, SHA-256 of the configuration, ranks and scalings.
    """

    modules: dict[str, ModuleState]
    clients: tuple[str, ...]
    weights: tuple[float, ...]
    settings: dict[str, Any]
    dense: dict[str, Tensor] = field(default_factory=dict)
    layout: dict[str, Any] | None = None
    record: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return (
            f"State({len(self.clients)} clients, {len(self.modules)} modules, rank {self.rank}, "
            f"captured {self.captured:.4f})"
        )

    @property
    def rank(self) -> int:
        """Server rank R."""
        return next(iter(self.modules.values())).s.numel()

    @property
    def captured(self) -> float:
        """Energy of the mean update that the state holds, ‖Ŵ‖²/‖W̄‖² over all modules, ≤ 1."""
        return self._energy("captured")

    @property
    def attainable(self) -> float:
        """The same fraction for the best possible state of this rank."""
        return self._energy("attainable")

    @property
    def ambiguous(self) -> tuple[str, ...]:
        """Names of modules whose cut falls into a tie: the state is one of several equals."""
        return tuple(name for name, m in self.modules.items() if m.stat("ambiguous"))

    def _energy(self, name: str) -> float:
        total = sum(m.stat("norm") ** 2 for m in self.modules.values())
        if total == 0:
            return 1.0
        return sum(m.stat(name) * m.stat("norm") ** 2 for m in self.modules.values()) / total

    def readout(
        self, rank: int, scaling: float = 1.0, pad: str = "zero", seed: int = 0
    ) -> Factors | dict[str, Factors]:
        """An adapter of any rank: slices of the stored singular value decomposition.

        Parameters
        ----------
        rank : int
            Rank of the adapter, ≥ 1; above R it is padded.
        scaling : float
            alpha/r of the receiving adapter, > 0: s·B·A is the update.
        pad : {"zero", "trainable"}
            Pairs beyond the effective rank: zeros, which stay zero for ever in training, or
            B = 0 beside seeded unit rows of A, which do not.
        seed : int
            Of the trainable rows.

        Returns
        -------
        (lora_B (d_out, rank), lora_A (rank, d_in)), or a dict of them by module. Readouts of
        different ranks and equal scaling are nested, bit for bit.
        """
        out = self._readouts(rank, scaling, pad, seed)
        return out[UNNAMED] if tuple(out) == (UNNAMED,) else out

    def _readouts(self, rank: int, scaling: float, pad: str, seed: int) -> dict[str, Factors]:
        rank, seed, factor = integer("rank", rank, 1), integer("seed", seed), number(scaling)
        require(factor is not None, "scaling", repr(scaling), "alpha/r, a number above zero")
        require(isinstance(pad, str), "pad", repr(pad), "'zero' or 'trainable'")
        return {
            name: torch.ops.glora.readout(m.u, m.s, m.v, rank, factor, pad, seed)
            for name, m in self.modules.items()
        }

    def report(self) -> str:
        """The certificates in words, and whatever deserves a second look."""
        from .report import describe

        return describe(self)

    # --- files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, JSON in its metadata, atomically: the old file or the new."""
        path = Path(path)
        tensors = {
            f"modules/{name}/{part}": getattr(m, part).contiguous()
            for name, m in self.modules.items()
            for part in _TENSORS
        } | {f"dense/{name}": x.contiguous() for name, x in self.dense.items()}
        here = path.resolve().parent
        described = {
            "format_version": FORMAT_VERSION,
            "modules": list(self.modules),
            "clients": self.clients,
            "weights": self.weights,
            "settings": self.settings,
            "layout": self.layout,
            "record": _moved(self.record, lambda place: _relative(place, here)),
        }
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            save_file(tensors, partial, metadata={"glora": json.dumps(described)})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> State:
        """Read a file written by `save`.

        Raises
        ------
        GloraError
            Not a safetensors file, not a glora state, or of a format this version cannot read.
        """
        path = Path(path)
        require(path.is_file(), "state", path, "an existing file", _WRITES, file=str(path))
        try:
            with safe_open(path, framework="pt") as file:
                return cls._read(path, file, (file.metadata() or {}).get("glora"))
        except SafetensorError as error:
            found = f"{path}, not a readable safetensors file ({error})"
            raise unfit("state", found, _STATE_FILE, _WRITES, file=str(path)) from error

    @classmethod
    def _read(cls, path: Path, file: Any, described: str | None) -> State:
        try:
            about: Mapping[str, Any] = json.loads(described or "")
            version = about["format_version"]
            complete = _complete(about)
            here = path.resolve().parent
            record = _moved(about.get("record"), lambda place: _absolute(place, here))
        except (ValueError, TypeError, KeyError, AttributeError):
            found = f"{path}, which carries no glora metadata"
            raise unfit("state", found, _STATE_FILE, _WRITES, file=str(path)) from None
        require(
            version in (1, FORMAT_VERSION),
            "format_version",
            f"{version} in {path}",
            f"1 or {FORMAT_VERSION}",
            "read it with the glora that wrote it",
            file=str(path),
        )
        require(
            complete,
            "metadata",
            f"{path}, whose entries do not fit",
            "settings with basis, missing and rank, modules, one weight per client, and the layout",
            "the file is damaged: write it again",
            file=str(path),
        )
        keys = set(file.keys())
        wanted = {f"modules/{name}/{part}" for name in about["modules"] for part in _TENSORS}
        lacking = sorted(wanted - keys)
        require(
            bool(wanted) and not lacking,
            "tensors",
            f"{path} without {', '.join(lacking[:3]) or 'any module'}",
            "all tensors of every module it lists",
            "the file is incomplete: write it again",
            file=str(path),
            tensor=lacking[0] if lacking else None,
        )
        modules = {
            name: ModuleState(*(file.get_tensor(f"modules/{name}/{part}") for part in _TENSORS))
            for name in about["modules"]
        }
        for name, m in modules.items():
            require(
                _fits(m, len(about["clients"])),
                f"module {name!r}",
                f"u {tuple(m.u.shape)}, s {tuple(m.s.shape)}, v {tuple(m.v.shape)} in {path}",
                "finite u (d_out, R), s (R,) ≥ 0, v (d_in, R) and a row of statistics per client",
                "the file is damaged: write it again",
                file=str(path),
                tensor=f"modules/{name}/u",
            )
        return cls(
            modules,
            tuple(about["clients"]),
            tuple(about["weights"]),
            dict(about["settings"]),
            {k.removeprefix("dense/"): file.get_tensor(k) for k in sorted(keys - wanted)},
            about["layout"],
            record,
        )

    def write_adapter(
        self,
        folder: str | os.PathLike[str],
        rank: int,
        *,
        pad: str = "zero",
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        """Write a PEFT folder of uniform rank, ``lora_alpha = rank``, fp32, in one step.

        Raises
        ------
        GloraError
            The state was not made from PEFT folders, or `folder` exists and not `overwrite`.
        """
        from .adapters import write_adapter

        if self.layout is None:
            raise unfit(
                "layout",
                None,
                "a state made from PEFT folders",
                "use readout() in Python and save the factors as your framework stores them",
            )
        factors = self._readouts(rank, 1.0, pad, seed)
        write_adapter(folder, factors, layout=self.layout, dense=self.dense, overwrite=overwrite)


def _complete(about: Mapping[str, Any]) -> bool:
    """Whether the entries of a file's metadata are of the kinds they should be."""
    names, weights, layout = about["clients"], about["weights"], about["layout"]
    return (
        isinstance(about["settings"], dict)
        and {"basis", "missing", "rank"} <= about["settings"].keys()
        and all(isinstance(x, list) for x in (names, weights, about["modules"]))
        and all(isinstance(x, str) for x in names + about["modules"])
        and all(type(x) in (int, float) for x in weights)
        and len(names) == len(weights)
        and (layout is None or layout["modules"].keys() >= set(about["modules"]))
    )


def _fits(m: ModuleState, clients: int) -> bool:
    """Whether a module's tensors belong together and hold numbers."""
    rank = m.s.numel()
    return (
        m.u.dim() == m.v.dim() == 2
        and m.u.shape[1] == m.v.shape[1] == rank >= 1
        and m.s.shape == (rank,)
        and m.u.dtype == m.v.dtype
        and all(x.is_floating_point() for x in (m.u, m.s, m.v))
        and m.stats.shape == (len(STATS),)
        and m.client_stats.shape in ((clients, len(CLIENT_STATS)), (0, len(CLIENT_STATS)))
        and m.present.shape == (clients,)
        and m.eig_u.dim() == m.eig_v.dim() == 1
        and min(m.eig_u.numel(), m.eig_v.numel()) >= rank
        and all(bool(x.isfinite().all()) for x in (m.u, m.s, m.v, m.client_stats))
        and not any(
            bool(x.isnan()) and (m.tells_of_clients or name not in FROM_CLIENTS)
            for name, x in zip(STATS, m.stats, strict=True)
        )
        and bool((m.s >= 0).all())
    )


def _moved(record: dict[str, Any] | None, place: Callable[[str], str]) -> dict[str, Any] | None:
    """A record with the clients' paths put otherwise."""
    if record is None:
        return None
    clients = [entry | {"path": place(entry["path"])} for entry in record["clients"]]
    return record | {"clients": clients}


def _relative(path: str, folder: Path) -> str:
    """`path` as seen from `folder`, where there is a way: state and clients may move together."""
    place = Path(path)
    real = place.parent.resolve() / place.name  # a link keeps its name: clients go by it
    try:
        return Path(os.path.relpath(real, folder)).as_posix()
    except ValueError:  # another drive
        return path


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(folder / path)
