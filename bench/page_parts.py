"""Markdown: tables, and the generated parts of hand-written pages.

A part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["renew", "table"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def renew(page: Path, parts: dict[str, str]) -> None:
    """Put every part into its place; a page without that place is refused."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        place = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not place.search(text):
            raise SystemExit(f"{page} has no lines <!-- begin {name} --> and <!-- end {name} -->")
        text = place.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")
