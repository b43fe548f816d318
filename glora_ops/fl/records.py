"""A run's folder: configuration, metrics round by round, and the state after the last round.

    RUNS/<config>/<method>/seed<k>/
        run.json                 resolved configuration, method, seed, learning rate, versions
        metrics.jsonl            one line per round, round 0 before any training
        checkpoint.safetensors   server and client state after the last finished round
        done                     stands when the run is complete

The line of a round is written before its checkpoint. After a kill the lines behind the checkpoint
are dropped and their rounds run again, with the same result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import GloraError, require, unfit
from .files import replacing, write_text
from .messages import Pairs
from .server import SVD, Server

__all__ = ["Run", "replied", "server_from", "server_tensors"]

FORMAT_VERSION = 1


def server_tensors(server: Server) -> dict[str, Tensor]:
    """All tensors of a server state by name."""
    out = {f"dense/{n}": x for n, x in server.dense.items()}
    for prefix, pairs in (("factors", server.factors), *_numbered(server.merged)):
        for m, pair in pairs.items():
            out |= {f"{prefix}/{m}/{side}": x for side, x in zip("BA", pair, strict=True)}
    for m, svd in server.svd.items():
        out |= {f"svd/{m}/{part}": x for part, x in zip("usv", svd, strict=True)}
    return out


def server_from(tensors: Mapping[str, Tensor], about: Mapping[str, Any], fresh: Server) -> Server:
    """The state again; `fresh` is the method's start, whose setup it shares.

    Tensors are copied: their bits and their layout in memory are then the same after a restart as
    in a run that goes on, and so is everything computed from them.
    """
    copied = {name: x.contiguous().clone() for name, x in tensors.items()}

    def named(prefix: str, parts: str) -> dict[str, Any]:
        start = f"{prefix}/"
        modules = dict.fromkeys(k[len(start) : -2] for k in copied if k.startswith(start))
        return {m: tuple(copied[f"{start}{m}/{p}"] for p in parts) for m in modules}

    return replace(
        fresh,
        round=about["round"],
        ranks=tuple(about["ranks"]),
        dense={n: copied[f"dense/{n}"] for n in fresh.dense},
        factors=named("factors", "BA"),
        svd={m: SVD(*x) for m, x in named("svd", "usv").items()},
        merged=tuple(named(f"merged{k}", "BA") for k in range(about["merged"])),
        notes={},
    )


def server_about(server: Server) -> dict[str, Any]:
    return {"round": server.round, "ranks": list(server.ranks), "merged": len(server.merged)}


def _numbered(merged: tuple[Pairs, ...]) -> list[tuple[str, Pairs]]:
    return [(f"merged{k}", pairs) for k, pairs in enumerate(merged)]


def _decisive(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's numbers come from; other arms of its configuration may come and go."""
    config, method = about["config"], about["method"]
    keys = config.keys() - {"about", "hours", "methods"}
    return {
        **{key: about[key] for key in ("method", "seed", "lr", "parameters", "examples")},
        **{key: config[key] for key in sorted(keys)},
        "methods": {method: config["methods"].get(method)},
    }


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Each value that is another one, by its path."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys((*before, *now))
        inner = [(f"{name}.{key}" if name else key, key) for key in keys]
        return [x for path, k in inner for x in _differences(before.get(k), now.get(k), path)]
    return [] if before == now else [f"{name} {now} instead of {before}"]


def replied(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any client replied in any round; without that the model is the base."""
    return any(line["clients"] for line in lines)


class Run:
    """Reads and writes one run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about_path = folder / "run.json"
        self.metrics_path = folder / "metrics.jsonl"
        self.checkpoint_path = folder / "checkpoint.safetensors"
        self.done_path = folder / "done"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out: two that write one run would mix their rounds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise unfit(
                "runs",
                f"{str(self.folder)!r}, where another process is at work",
                "one process a run",
                "wait for it or stop it, then --resume; or another -o",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, about: Mapping[str, Any], *, resume: bool) -> bool:
        """Make the folder ready; True where a checkpoint of the same run is there to go on from.

        Raises
        ------
        GloraError
            If the folder holds another run, or one that is not to be resumed.
        """
        if self.about_path.exists():
            require(resume, "runs", f"the existing {str(self.folder)!r}", "a new folder",
                    "--resume to go on, or another -o")  # fmt: skip
            before = json.loads(self.about_path.read_text())
            odd = _differences(_decisive(before), _decisive(about))
            require(not odd, f"the run in {str(self.folder)!r}", ", ".join(odd),
                    "the configuration and data it began with",
                    "another -o for another experiment")  # fmt: skip
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.about_path, json.dumps(about, indent=1, sort_keys=True) + "\n")
        going_on = self.checkpoint_path.exists()
        if not going_on and not self.done:  # killed before its first: that line goes too
            self.metrics_path.unlink(missing_ok=True)
        return going_on

    def append(self, line: Mapping[str, Any]) -> None:
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def commit(
        self, server: Server, engine_state: tuple[Mapping[str, Tensor], Mapping[str, Any]]
    ) -> None:
        """Replace the checkpoint in one step."""
        tensors = {f"server/{n}": x for n, x in server_tensors(server).items()}
        tensors |= {f"engine/{n}": x for n, x in engine_state[0].items()}
        about = {"format": FORMAT_VERSION, "server": server_about(server)}
        about["engine"] = dict(engine_state[1])
        with replacing(self.checkpoint_path) as partial:
            save_file(
                {n: x.detach().contiguous().clone() for n, x in tensors.items()},
                partial,
                {"glora_fl": json.dumps(about)},
            )

    def restore(self, fresh: Server) -> tuple[Server, dict[str, Tensor], dict[str, Any]]:
        """Server state, the engine's tensors and JSON; metrics behind the checkpoint are dropped.

        Raises
        ------
        GloraError
            If the checkpoint is not one of ours.
        """
        try:
            with safe_open(self.checkpoint_path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("glora_fl", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no dict
        except (SafetensorError, ValueError) as error:
            raise GloraError(
                f"checkpoint: {self.checkpoint_path} is unreadable ({error})"
            ) from None
        require(
            isinstance(about, dict) and about.get("format") == FORMAT_VERSION,
            "checkpoint",
            f"{self.checkpoint_path} without format {FORMAT_VERSION}",
            "a checkpoint of this version",
            "run anew into another folder",
        )

        def under(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}

        server = server_from(under("server/"), about["server"], fresh)
        kept = [line for line in self.lines() if line["round"] <= server.round]
        write_text(self.metrics_path, "".join(json.dumps(x, sort_keys=True) + "\n" for x in kept))
        engine = {n: x.clone() for n, x in under("engine/").items()}
        return server, engine, about["engine"]

    def lines(self) -> list[dict[str, Any]]:
        """The metrics, without a last line that was cut off."""
        if not self.metrics_path.exists():
            return []
        out = []
        for text in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(text))
            except ValueError:
                break
        return out

    @property
    def done(self) -> bool:
        return self.done_path.exists()

    def finish(self) -> None:
        write_text(self.done_path, "")
