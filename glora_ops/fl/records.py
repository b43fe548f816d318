"""A run's folder: configuration, metrics round by round, and the state after the last round.

    RUNS/<config>/<method>/seed<k>/
        run.json                 resolved configuration, method, seed, learning rate, versions
        metrics.jsonl            one line per round, round 0 before any training
        predictions.jsonl        what the server's model answered, example by example, at the end
        checkpoint.safetensors   server and client state after the last finished round
        done                     stands when the run is complete

The line of a round is written before its checkpoint. After a kill the lines behind the checkpoint
are dropped and their rounds run again, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import GloraError, require, unfit
from ..runtime.hidden import sweep
from ..runtime.locks import lock
from ..runtime.outputs import new_file, ours, write_text
from ..runtime.reading import open_regular, parse_json_object
from .forms import read_about, read_lines
from .messages import Pairs
from .server import SVD, Server
from .tasks.base import Answer

__all__ = ["Run", "replied", "server_from", "server_tensors"]

FORMAT_VERSION = 2  # 1 had no digest


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def server_tensors(server: Server) -> dict[str, Tensor]:
    """All tensors of a server state by name."""
    out = {f"dense/{n}": x for n, x in server.dense.items()}
    for prefix, pairs in (("factors", server.factors), *_numbered(server.merged)):
        for m, pair in pairs.items():
            out |= {f"{prefix}/{m}/{side}": x for side, x in zip("BA", pair, strict=True)}
    for m, svd in server.svd.items():
        out |= {f"svd/{m}/{part}": x for part, x in zip("usv", svd, strict=True)}
    return out | {f"moments/{n}": x for n, x in server.moments.items()}


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
        moments=under("moments/", copied),
        notes={},
    )


def server_about(server: Server) -> dict[str, Any]:
    return {"round": server.round, "ranks": list(server.ranks), "merged": len(server.merged)}


def _numbered(merged: tuple[Pairs, ...]) -> list[tuple[str, Pairs]]:
    return [(f"merged{k}", pairs) for k, pairs in enumerate(merged)]


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of everything in a checkpoint."""
    total = hashlib.blake2b(text.encode(), digest_size=32)
    for name, x in sorted(tensors.items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _decisive(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's numbers come from; other arms of its configuration may come and go."""
    config, method = about["config"], about["method"]
    keys = config.keys() - {"about", "hours", "methods"}
    return {
        **{key: about[key] for key in ("method", "seed", "lr", "parameters", "examples")},
        "weights": about.get("weights"),
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
        self.predictions_path = folder / "predictions.jsonl"
        self.checkpoint_path = folder / "checkpoint.safetensors"
        self.done_path = folder / "done"
        self.lock_path = folder / ".lock"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out: two that write one run would mix their rounds."""
        self.folder.mkdir(parents=True, exist_ok=True)

        def refuse(holder: str) -> GloraError:
            return unfit(
                "runs",
                f"{str(self.folder)!r}, where {holder} is at work",
                "one process a run",
                "wait for it or stop it, then --resume; or another -o",
            )

        with lock(self.lock_path, refuse):
            sweep(self.folder, ours)
            yield

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
            before = read_about(self.about_path)
            odd = _differences(_decisive(before), _decisive(about))
            require(not odd, f"the run in {str(self.folder)!r}", ", ".join(odd),
                    "the configuration and data it began with",
                    "another -o for another experiment")  # fmt: skip
        else:
            found = sorted(path.name for path in self.folder.glob("[!.]*"))
            require(not found, "runs", f"{str(self.folder)!r} with {', '.join(found[:5])} but no "
                    "run.json", "a new folder, or that of a run", "another -o")  # fmt: skip
            write_text(self.about_path, json.dumps(about, indent=1, sort_keys=True) + "\n")
        going_on = self.checkpoint_path.exists()
        if not going_on and not self.done and self.metrics_path.exists():
            count = len(self.lines())
            require(count <= 1, f"the run in {str(self.folder)!r}", f"{count} rounds",
                    "their checkpoint.safetensors", "restore it, or choose another -o")  # fmt: skip
            self.metrics_path.unlink()  # killed before its first: that line goes too
        return going_on

    def append(self, line: Mapping[str, Any]) -> None:
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_predictions(self, round: int, answers: Iterable[Answer]) -> None:
        lines = (json.dumps({"round": round, **a._asdict()}, sort_keys=True) for a in answers)
        write_text(self.predictions_path, "".join(line + "\n" for line in lines))

    def commit(
        self, server: Server, engine_state: tuple[Mapping[str, Tensor], Mapping[str, Any]]
    ) -> None:
        """Replace the checkpoint in one step."""
        tensors = {f"server/{n}": x for n, x in server_tensors(server).items()}
        tensors |= {f"engine/{n}": x for n, x in engine_state[0].items()}
        about = {"format": FORMAT_VERSION, "server": server_about(server)}
        about["engine"] = dict(engine_state[1])
        text = json.dumps(about)
        copies = {n: x.detach().contiguous().clone() for n, x in tensors.items()}
        with new_file(self.checkpoint_path, ours) as partial:
            save_file(copies, partial, {"glora_fl": text, "blake2b": _digest(copies, text)})

    def restore(self, fresh: Server) -> tuple[Server, dict[str, Tensor], dict[str, Any]]:
        """Server state, the engine's tensors and JSON; metrics behind the checkpoint are dropped.

        Raises
        ------
        GloraError
            If the checkpoint is not one of ours.
        """
        text, digest, tensors = self._checkpoint()
        try:
            about = parse_json_object(text.encode())
        except ValueError:
            about = {}
        require(
            about.get("format") == FORMAT_VERSION,
            "checkpoint",
            f"{self.checkpoint_path} without format {FORMAT_VERSION}",
            "a checkpoint of this version",
            "run anew into another folder",
        )
        require(digest == _digest(tensors, text), "checkpoint",
                f"{self.checkpoint_path}, whose content has changed since it was written",
                "the digest it carries", "restore it, or run anew into another folder")  # fmt: skip
        server = server_from(under("server/", tensors), about["server"], fresh)
        kept = self.lines()[: server.round + 1]
        require(len(kept) == server.round + 1, "metrics", f"{len(kept)} lines in {self.folder}",
                f"one for each of the checkpoint's rounds, 0 … {server.round}",
                "restore metrics.jsonl, or run anew into another folder")  # fmt: skip
        write_text(self.metrics_path, "".join(json.dumps(x, sort_keys=True) + "\n" for x in kept))
        engine = {n: x.clone() for n, x in under("engine/", tensors).items()}
        return server, engine, about["engine"]

    def lines(self) -> list[dict[str, Any]]:
        """The metrics, without a last line that was cut off; refused where they are damaged."""
        if not self.metrics_path.exists() and not self.done:
            return []
        return read_lines(self.metrics_path, whole=self.done)

    def _checkpoint(self) -> tuple[str, str, dict[str, Tensor]]:
        """Its JSON, the digest it carries, its tensors."""
        try:
            open_regular(self.checkpoint_path).close()
            with safe_open(self.checkpoint_path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no dict
        except SafetensorError as error:
            raise GloraError(
                f"checkpoint: {self.checkpoint_path} is unreadable ({error})"
            ) from None
        return about.get("glora_fl", ""), about.get("blake2b", ""), tensors

    @property
    def done(self) -> bool:
        return self.done_path.exists()

    def finish(self) -> None:
        write_text(self.done_path, "")
