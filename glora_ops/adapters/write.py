"""An adapter folder that PEFT loads and hot-swaps correctly."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import require
from ..runtime.marks import digests, unchanged
from ..runtime.outputs import check_free, claimed, new_folder
from ..runtime.tensors import read_mark, save_tensors
from .adapter_config import CONFIG_NAME
from .experts import PARAMETER_KINDS, nested, parameter_pairs
from .modules import PREFIX, factor_keys, saved_by
from .read import TENSORS_NAME
from .targets import exactly

__all__ = ["strangers", "strangers_unmarked", "write_adapter"]

CARD_NAME = "README.md"
MARK = "glora_adapter"  # key in the tensors' metadata: digests of the files beside them


def write_adapter(
    folder: str | os.PathLike[str],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    layout: Mapping[str, Any],
    dense: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Path:
    """Write a PEFT LoRA folder: tensors, configuration and a model card.

    One rank for all modules, lora_alpha = rank (so the scaling is 1), no patterns, full module
    paths: the form that PEFT's `hotswap_adapter` treats correctly as well.

    Parameters
    ----------
    folder : path
        Appears in one step, complete; must not exist unless `overwrite`.
    factors : mapping of str to (B, A)
        B (d_out, r) and A (r, d_in) of each module, of one r throughout; ΔW = B A.
    layout : mapping
        Of `adapter_layout`; must describe every module in `factors`.
    dense : mapping of str to Tensor
        Weights saved in full; each must lie in one of the layout's ``modules_to_save``. Their
        dtypes are kept.
    dtype : torch.dtype
        Of the factors as they are written: float32, bfloat16 or float16.
    overwrite : bool
        Replace an existing folder that this function wrote and nobody changed (`strangers`).
    dry_run : bool
        Check everything, and write nothing.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    GloraError
        If shapes, names or values do not fit, or `folder` exists; nothing is written then.
    """
    ranks = {size for b, a in factors.values() for size in (b.shape[-1], a.shape[0])}
    require(
        len(ranks) == 1 and 0 not in ranks,
        "factors",
        f"ranks {sorted(ranks)}",
        "one rank ≥ 1 for all modules",
        "pad the smaller ones with zeros",
    )
    (rank,) = ranks
    tensors: dict[str, Tensor] = {}
    entries, tied = layout["modules"], layout.get("tied", {})  # older states have less
    # Tied once more and exactly: their own solutions agree up to rounding only.
    factors = {
        name: (factors[tied[name]][1].mT, factors[tied[name]][0].mT) if name in tied else pair
        for name, pair in factors.items()
    }
    for name in factors:
        require(name in entries, f"factors[{name!r}]", "no entry in the layout", "one")
    kinds = {name: entries[name]["kind"] for name in factors}
    in_modules = {n: pair for n, pair in factors.items() if kinds[n] not in PARAMETER_KINDS}
    parameters = parameter_pairs({n: factors[n] for n in factors if n not in in_modules}, kinds)
    for wrapper, (b, a) in nested(parameters).items():
        tensors |= dict(zip(factor_keys(wrapper, "linear"), (a, b), strict=True))
    for name, (b, a) in in_modules.items():
        entry = entries[name]
        a_key, b_key = factor_keys(name, entry["kind"])
        kh, kw = entry["kernel"] or (1, 1)
        require(
            b.ndim == a.ndim == 2 and a.shape[1] % (kh * kw) == 0,
            f"factors[{name!r}]",
            f"B {tuple(b.shape)}, A {tuple(a.shape)}",
            f"matrices, A with a multiple of {kh * kw} columns",
        )
        conv = entry["kind"] == "conv2d"
        tensors[a_key] = a.reshape(rank, -1, kh, kw) if conv else a
        tensors[b_key] = b.reshape(-1, rank, 1, 1) if conv else b
    tensors = {key: _own(t.detach().to("cpu", dtype)) for key, t in tensors.items()}
    places = Counter(t.data_ptr() for t in tensors.values())
    tensors = {key: t.clone() if places[t.data_ptr()] > 1 else t for key, t in tensors.items()}
    modules_to_save: set[str] = set()
    for name, tensor in (dense or {}).items():
        owners = saved_by(name, layout["modules_to_save"])
        owned = owners or name in layout.get("base_copies", []) or name in tied
        require(bool(owned), f"dense[{name!r}]", "no owner", "one of modules_to_save")
        modules_to_save.update(owners)
        tensors[PREFIX + name] = tensor.detach().to("cpu", copy=True).contiguous()
    for key, tensor in tensors.items():
        finite = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        require(bool(torch.isfinite(finite).all()), key, "values not finite in its dtype", "finite")

    config = {
        "peft_type": "LORA",
        "task_type": layout["task_type"],
        "auto_mapping": layout.get("auto_mapping"),
        "base_model_name_or_path": layout["base_model"],
        "revision": layout["revision"],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        # PEFT adapts no parameter of a module with dropout.
        "lora_dropout": 0.0 if parameters else layout["lora_dropout"],
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": any(entries[name]["fan_in_fan_out"] for name in factors),
        "target_modules": sorted(in_modules.keys() - tied),
        "exclude_modules": exactly(in_modules) if layout.get("exact") and in_modules else None,
        "ensure_weight_tying": bool(tied),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(modules_to_save) or None,
    }
    precision = str(dtype).removeprefix("torch.")
    texts = {
        CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True),
        CARD_NAME: _model_card(config, len(factors), sorted(dense or {}), precision),
    }
    mark = json.dumps(digests({name: text.encode() for name, text in texts.items()}))
    final = Path(folder).resolve()
    if dry_run:
        check_free(final, strangers, overwrite=overwrite)
        return Path(folder)
    with claimed(final, strangers), new_folder(final, strangers, overwrite=overwrite) as path:
        save_tensors(tensors, path / TENSORS_NAME, {"format": "pt", MARK: mark})
        for name, text in texts.items():
            (path / name).write_bytes(text.encode())
    return Path(folder)


def strangers(folder: Path) -> list[str]:
    """What in a folder `write_adapter` did not write, or somebody has changed since, by name.

    What was written carries a mark in the tensor file's metadata, which whoever saves other tensors
    there replaces. Files beside it are compared by the digests in it.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    mark = read_mark(folder / TENSORS_NAME, MARK)
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if mark is None or (entry.name != TENSORS_NAME and not unchanged(entry, mark))
    )


def strangers_unmarked(folder: Path) -> list[str]:
    """`strangers` of a folder from before there were marks, known by its texts alone."""
    found = {entry.name: entry for entry in folder.iterdir()}
    names = {TENSORS_NAME, CONFIG_NAME, CARD_NAME}
    odd = [name for name, entry in found.items() if name not in names or entry.is_symlink()]
    if odd or found.keys() != names:
        return sorted(odd or found)
    try:
        text = found[CONFIG_NAME].read_text(encoding="utf-8")
        config = json.loads(text)
        with safe_open(found[TENSORS_NAME], framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata()
        dense = sorted(key.removeprefix(PREFIX) for key in keys if ".lora_" not in key)
        card = _model_card(config, len(config["target_modules"]), dense)
        own = (
            metadata == {"format": "pt"}
            and text == json.dumps(config, indent=2, sort_keys=True)
            and card == found[CARD_NAME].read_text(encoding="utf-8")
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        own = False
    return [] if own else sorted(found)


def _own(t: Tensor) -> Tensor:
    """`t`, or a copy where it is part of something larger: safetensors takes no views."""
    whole = t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
    return t if whole else t.clone(memory_format=torch.contiguous_format)


def _model_card(
    config: Mapping[str, Any], modules: int, dense: list[str], precision: str = "float32"
) -> str:
    base = config["base_model_name_or_path"]
    front = ["library_name: peft", "tags: [lora, glora]"]
    if base:
        front.append(f"base_model: {json.dumps(base)}")  # JSON strings are YAML strings
    lines = [
        "---",
        *front,
        "---",
        "",
        "# Aggregated LoRA adapter",
        "",
        f"Written by glora. {modules} adapted modules, rank {config['r']}, "
        f"lora_alpha {config['r']} (scaling 1), factors in {precision}.",
    ]
    if dense:
        lines += ["", "Saved in full: " + ", ".join(f"`{name}`" for name in dense) + "."]
    return "\n".join(lines) + "\n"
