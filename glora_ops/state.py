"""The server state: what an aggregation leaves behind, and what adapters are read out of."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import check_padding, integer, number
from .bindings.ops import Readout
from .certificates import CLIENT_STATS, FROM_CLIENTS, STATS
from .errors import UncheckedFileWarning, clean, require, unfit
from .runtime.hidden import destination
from .runtime.outputs import new_file
from .runtime.tensors import read_mark, save_tensors
from .runtime.urls import is_url
from .state_clients import remove_unused
from .state_file import MARK, StateFile, encode, read

__all__ = ["Factors", "ModuleState", "State"]

Factors = tuple[Tensor, Tensor]

_REMEDY = "aggregate again, or call torch.ops.glora.client_stats with the factors"
#: Name of the module of a state that was made from bare factor pairs.
UNNAMED = ""
#: Dtypes in which adapters are written, by the names that commands and records use.
WRITTEN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        Weighted means of full tensors (classifier heads, modules_to_save), and base weights that
        the clients saved beside adapted embeddings.
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
        """Who, how, and what it holds of what it could; `report` says the rest."""
        clients, modules = _count(len(self.clients), "client"), _count(len(self), "module")
        tied = f", a tie in {len(self.ambiguous)}" if self.ambiguous else ""
        return (
            f"State({clients}, {modules}, rank {self.rank}, basis {self.settings['basis']}, "
            f"captured {self.captured:.4f} of {self.attainable:.4f} attainable{tied})"
        )

    def __iter__(self) -> Iterator[str]:
        """Names of the modules: ``for name in state: state[name].stat("norm")``."""
        return iter(self.modules)

    def __len__(self) -> int:
        """How many modules."""
        return len(self.modules)

    def __getitem__(self, name: str) -> ModuleState:
        """A module by its name."""
        return self.modules[name]

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
        self,
        rank: int,
        scaling: float = Readout.scaling,
        pad: str = Readout.pad,
        seed: int = Readout.seed,
    ) -> Factors | dict[str, Factors]:
        """An adapter of any rank: slices of the stored singular value decomposition.

        Parameters
        ----------
        rank : int
            Rank of the adapter, ≥ 1; above R it is padded, up to 16 R, or 1024 if that is more.
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
        if factor is None:
            raise unfit("scaling", repr(scaling), "alpha/r, a number above zero")
        check_padding("rank", rank, self.rank, "the state")
        require(isinstance(pad, str), "pad", repr(pad), "'zero' or 'trainable'")
        for name, m in self.modules.items():
            root = math.sqrt(max(m.stat("norm"), 0.0) / factor) if factor > 0 else 0.0  # ≥ √S₁
            require(
                root <= torch.finfo(m.u.dtype).max,
                "scaling",
                factor,
                f"one at which factors of {name or 'the update'!r}, {root:.2g}, fit {m.u.dtype}",
                "the update is too large for factors at this scaling: raise it",
            )
        return {
            name: torch.ops.glora.readout(m.u, m.s, m.v, rank, factor, pad, seed)
            for name, m in self.modules.items()
        }

    def to(self, device: str | torch.device) -> State:
        """The same state with bases and full weights on a device; certificates stay on the CPU."""
        moved = {
            name: replace(m, u=m.u.to(device), s=m.s.to(device), v=m.v.to(device))
            for name, m in self.modules.items()
        }
        return replace(
            self, modules=moved, dense={name: x.to(device) for name, x in self.dense.items()}
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the singular values of the update and the eigenvalues around the cut.

        Parameters
        ----------
        path : path
            .png, .pdf or .svg; a picture that glora drew before is replaced. Needs matplotlib.
        """
        from .analysis.plots import plot_state

        plot_state(self, path)

    def report(self) -> str:
        """The certificates in words, and whatever deserves a second look."""
        from .state_report import describe

        return describe(self)

    # --- files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with checksums, atomically: the old file or the new.

        Of more than 65 536 clients, what is known of each goes into a folder beside it.
        The bytes are the same for the same state. Format: docs/reliability.md.

        Raises
        ------
        GloraError
            If something stands at `path` that is no state. What could not be read again: values
            that no state has, settings that JSON cannot hold or that are none of glora's, names
            that are not printable or too long.
        """
        path = Path(path)
        here = destination(path).parent
        tensors, metadata, beside = encode(
            {
                "modules": list(self.modules),
                "clients": self.clients,
                "weights": self.weights,
                "settings": self.settings,
                "layout": self.layout,
                "record": _moved(self.record, _relative(here)),
            },
            {name: vars(m) for name, m in self.modules.items()},
            self.dense,
            apart=True,
        )
        real = Path(os.path.realpath(path))
        before = read_mark(real, MARK) or {}
        with new_file(path, _no_state) as partial:
            save_tensors(tensors, partial, metadata)
            if beside is not None:
                beside.write(real.parent)
        if "beside" in before:
            remove_unused(real.parent, before, MARK)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> State:
        """Read a file written by `save`; checksums, metadata and values are all checked.

        Raises
        ------
        GloraError
            Not a safetensors file, not a glora state, of a format this version cannot read,
            damaged, or changed while it was read.

        Warns
        -----
        UncheckedFileWarning
            The file is of a format without checksums, 1 or 2.
        """
        file = read(Path(path))
        if file.note is not None:
            warnings.warn(clean(file.note), UncheckedFileWarning, stacklevel=2)
        return cls.of(file)

    @classmethod
    def of(cls, file: StateFile) -> State:
        """The state in a file that was read."""
        about = file.about
        here = file.path.resolve().parent
        return cls(
            {name: ModuleState(**parts) for name, parts in file.modules.items()},
            tuple(about["clients"]),
            tuple(about["weights"]),
            about["settings"],
            file.dense,
            about["layout"],
            _moved(about.get("record"), lambda place: _absolute(place, here)),
        )

    def write_adapter(
        self,
        folder: str | os.PathLike[str],
        rank: int,
        *,
        pad: str = Readout.pad,
        seed: int = Readout.seed,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Write a PEFT folder of uniform rank, ``lora_alpha = rank``, in one step.

        Factors are rounded to `dtype`: float32, bfloat16 or float16. With `dry_run` everything is
        checked and nothing written.

        Raises
        ------
        GloraError
            The state was not made from PEFT folders, `rank` would be nothing but padding, as
            `readout`, or `folder` exists and not `overwrite`, or it holds anything that
            `write_adapter` did not write.
        """
        from .adapters import write_adapter

        if self.layout is None:
            raise unfit(
                "layout",
                None,
                "a state made from PEFT folders",
                "use readout() in Python and save the factors as your framework stores them",
            )
        require(
            dtype in WRITTEN.values(),
            "dtype",
            dtype,
            "torch.float32, torch.bfloat16 or torch.float16",
        )
        factors = self._readouts(rank, 1.0, pad, seed)
        write_adapter(
            folder, factors, layout=self.layout, dense=self.dense, dtype=dtype,
            overwrite=overwrite, dry_run=dry_run,
        )  # fmt: skip


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _no_state(path: Path) -> list[str]:
    """The name of a file that is no state of glora's, which `save` does not replace."""
    return [] if read_mark(path, MARK) else [path.name]


def _moved(record: dict[str, Any] | None, place: Callable[[str], str]) -> dict[str, Any] | None:
    """A record with the clients' paths put otherwise; a URL is the same from everywhere."""
    if record is None:
        return None

    def moved(path: str) -> str:
        return path if is_url(path) else place(path)

    clients = [entry | {"path": moved(entry["path"])} for entry in record["clients"]]
    return record | {"clients": clients}


def _relative(folder: Path) -> Callable[[str], str]:
    """A path as seen from `folder`, where there is a way: state and clients may move together."""

    @cache  # of few folders, whose links are followed once
    def above(parent: str) -> Path | None:
        try:  # a link keeps its name: clients do
            return Path(os.path.relpath(os.path.realpath(parent), folder))
        except ValueError:  # another drive
            return None

    def relative(path: str) -> str:
        place = Path(path)
        parent = above(str(place.parent))
        return path if parent is None else (parent / place.name).as_posix()

    return relative


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(os.path.join(folder, path))
