"""The folder of a job: what lies where, sealed JSON, and what of it can be believed.

Every JSON file carries the SHA-256 of the canonical JSON (sorted keys, no spaces) of all its other
entries, and every one but the plan carries the plan's: what belongs to another plan is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GloraError, require, unfit
from ..runtime.outputs import write_text
from ..runtime.reading import parse_json_object, read_bytes

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "FOLDERS",
    "PLAN_NAME",
    "Job",
    "check_fit",
    "read_job",
    "refuse_link",
    "sealed",
    "strangers",
    "unsealed",
    "write_sealed",
]

PLAN_NAME = "plan.json"
MAX_BYTES = 2**28  # of a plan: some hundreds of bytes a client
FOLDERS = ("parts", "checked")


@dataclass(frozen=True)
class Job:
    """A job that was planned.

    Attributes
    ----------
    folder : Path
        Absolute.
    about : dict
        The content of its plan: `schema.Plan`.
    """

    folder: Path
    about: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of the plan."""
        digest: str = self.about["sha256"]
        return digest

    def part(self, number: int) -> Path:
        """The state of a part's modules."""
        return self.folder / "parts" / f"{number:05}.safetensors"

    def receipt(self, number: int) -> Path:
        return self.part(number).with_suffix(".json")

    def check(self, number: int) -> Path:
        return self.folder / "checked" / f"{number:05}.json"

    def read(self, path: Path, kind: str) -> dict[str, Any] | None:
        """A receipt or check of this plan; None where there is none."""
        if not os.path.lexists(path):
            return None
        found = unsealed(path, kind)
        require(found["plan"] == self.digest, kind, f"{str(path)!r} of another plan",
                "one of this plan", _AGAIN, file=str(path))  # fmt: skip
        return found


_AGAIN = "glora job work makes it again"
_OURS = "what glora job wrote there"


def read_job(folder: str | os.PathLike[str]) -> Job:
    """The job in a folder; raises `GloraError` where there is none, or its plan is damaged."""
    path = Path(os.path.abspath(folder))
    require((path / PLAN_NAME).is_file(), "job", repr(str(folder)), f"a folder with {PLAN_NAME}",
            "glora job plan makes one", file=str(path))  # fmt: skip
    return Job(path, unsealed(path / PLAN_NAME, "plan"))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with its digest."""
    return dict(content) | {"sha256": _digest(content)}


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Put JSON with its digest at `path`, in one step."""
    refuse_link(path)
    write_text(path, json.dumps(sealed(content)))


def refuse_link(path: Path) -> None:
    """Raise `GloraError` where what is written into a job would land somewhere else."""
    for place in (path.parent, path):
        require(not place.is_symlink(), "job", f"the link {str(place)!r}", "files of its own",
                "remove the link", file=str(place))  # fmt: skip


def unsealed(path: Path, kind: str) -> dict[str, Any]:
    """What `write_sealed` wrote; raises `GloraError` where it is anything else."""
    remedy = "plan the job anew, in a new folder" if kind == "plan" else _AGAIN
    try:
        found = parse_json_object(read_bytes(path, MAX_BYTES))
    except GloraError:
        raise
    except (OSError, ValueError) as error:
        raise unfit(
            kind, f"{str(path)!r}, which cannot be read ({error})", _OURS, remedy, file=str(path)
        ) from None
    check_fit(found, kind, path, remedy)
    rest = {key: value for key, value in found.items() if key != "sha256"}
    require(_digest(rest) == found["sha256"], kind, f"{str(path)!r}, damaged or edited", _OURS,
            remedy, file=str(path))  # fmt: skip
    return found


def check_fit(content: Mapping[str, Any], kind: str, path: Path, remedy: str) -> None:
    """Raise `GloraError` unless this is the JSON of a plan, a receipt or a check."""
    from pydantic import ValidationError

    from . import schema

    models: dict[str, type[BaseModel]] = {
        "plan": schema.Plan,
        "receipt": schema.Receipt,
        "check": schema.Check,
    }
    try:
        models[kind].model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise unfit(kind, f"{str(path)!r} ({said:.200})", _OURS, remedy, file=str(path)) from None


def strangers(folder: Path) -> list[str]:
    """What in a job's folder `glora job` did not write, by name."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    return [
        path.name for path in sorted(folder.iterdir()) if path.name not in (PLAN_NAME, *FOLDERS)
    ]


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
