"""The site: pages from all over the repository, generated references, mathematics offline.

Pages stay readable where they lie, with links to each other's files; here they are brought
together, their links follow, and what leads to source code becomes text.
"""

from __future__ import annotations

import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: Where pages that lie outside docs/ stand in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "examples/tutorial.py": "tutorial.md",
    "kernels/README.md": "kernels.md",
    "bench/README.md": "bench/how.md",
    "bench/results/cpu.md": "bench/cpu.md",
    "bench/results/gpu.md": "bench/gpu.md",
    "experiments/results/tables.md": "experiments/tables.md",
    "experiments/results/protocol.md": "experiments/protocol.md",
}
#: By page of the site: the file it is made of, relative to the repository.
SOURCES = {place: name for name, place in PAGES.items()}


def on_files(files: Files, config: Any) -> Files:
    def add(place: str, content: str) -> None:
        files.append(File.generated(config, place, content=content))

    for name, place in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        add(place, page_of(text) if name.endswith(".py") else text)
    add("reference/python.md", python())
    add("reference/ops.md", ops())
    add("reference/cli.md", command_line())
    add("mathjax.js", mathjax())
    add("site.css", (ROOT / "docs/site/site.css").read_text(encoding="utf-8"))
    return files


def page_of(script: str) -> str:
    """A script in cells as a page: its texts, and its code between them."""
    parts = []
    for cell in re.split(r"(?m)^# %%", script)[1:]:
        kind, _, body = cell.partition("\n")
        if kind == " [markdown]":
            parts.append(re.sub(r"(?m)^# ?", "", body).strip())
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts)


# --- links -----------------------------------------------------------------------------------

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")

    def follow(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path:
            return found[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if name == "docs/README.md":
            name = "README.md"
        there = PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            if not (ROOT / name).exists():
                raise SystemExit(f"{source}: {target} leads nowhere")
            return text  # source code, which the site does not show
        link = posixpath.relpath(there, posixpath.dirname(place) or ".")
        return f"{mark}[{text}]({link}{'#' + anchor if anchor else ''})"

    return LINK.sub(follow, markdown)


# --- mathematics -----------------------------------------------------------------------------

SETTINGS = """window.MathJax = {
  tex: {inlineMath: [["\\\\(", "\\\\)"]], displayMath: [["\\\\[", "\\\\]"]]},
  svg: {scale: 0.9},
  options: {ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex"}
}"""


def mathjax() -> str:
    """MathJax in one file, glyphs included, from its Python package."""
    import mathjax

    return (Path(mathjax.__file__).parent / "static/mathjax/es5/tex-svg.js").read_text("utf-8")


def on_post_page(output: str, page: Any, config: Any) -> str:
    if 'class="arithmatex"' not in output:
        return output
    file = posixpath.relpath("mathjax.js", posixpath.dirname(page.file.dest_uri) or ".")
    scripts = f'<script>{SETTINGS}</script><script src="{file}" defer></script>'
    return output.replace("</body>", scripts + "</body>")


# --- references ------------------------------------------------------------------------------


def python() -> str:
    """Every public name, by mkdocstrings from its docstring."""
    import glora_ops
    from glora_ops import distributed, fl, job

    parts = ["# Python", "`import glora_ops as glora`, which also registers `torch.ops.glora`."]
    parts += _public(glora_ops)
    parts.append("`from glora_ops import job`: [an aggregation in parts](../scale.md).")
    parts += _public(job)
    parts.append(
        "`from glora_ops import distributed`: [factors on the ranks of a process group]"
        "(../scale.md#factors-on-the-ranks-of-a-process-group)."
    )
    parts += _public(distributed)
    parts.append("`from glora_ops import fl`, with the extra: [federated runs](../federated.md).")
    return "\n\n".join([*parts, *_public(fl)])


def _public(module: ModuleType) -> Iterator[str]:
    for name in module.__all__:
        public = getattr(module, name)
        if isinstance(public, tuple):
            yield f"## {name}\n\n" + ", ".join(f"`{x}`" for x in public)
        elif callable(public):
            yield f"::: {public.__module__}.{public.__qualname__}"


def ops() -> str:
    """Every op: its function's docstring, and what torch knows of it."""
    import torch
    from glora_ops.bindings.library import OPS

    parts = ["# Every op", "Layouts, promises and arguments: [the ops](../ops.md)."]
    for name in OPS:
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(torch.ops.glora, packet), overload or "default")._schema
        text = re.sub(r"\d\.\d{9,}", lambda x: repr(float(x[0])), str(schema))  # 0.1, not 0.1000…
        lines = textwrap.fill(text, 96, subsequent_indent="    ")
        parts += [f"::: glora_ops.ops.{name.replace('.', '_')}", f"```\n{lines}\n```"]
    return "\n\n".join(parts)


def command_line() -> str:
    """Every command with its options."""
    import typer.main
    from typer.cli import get_docs_for_click

    from glora_ops.cli import app

    command = typer.main.get_command(app)
    _told_in_full(command)
    context = command.make_context("glora", [], resilient_parsing=True)
    return get_docs_for_click(obj=command, ctx=context, name="glora", title="Command line")


def _told_in_full(command: Any) -> None:
    """Whole first sentences for lists of commands, and what arguments are."""
    command.short_help = (command.help or "").partition("\n\n")[0]
    if hasattr(command, "find_help"):
        command.find_help()
    for inner in getattr(command, "commands", {}).values():
        _told_in_full(inner)
