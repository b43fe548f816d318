"""Imported first: says what to install where the extra `fl` is missing."""

from importlib.util import find_spec

from ..errors import require

_missing = [name for name in ("peft", "sklearn") if find_spec(name) is None]
require(
    not _missing,
    "glora_ops.fl",
    f"no package {', '.join(_missing)}",
    "the extra fl",
    "pip install 'glora[fl]'",
)
