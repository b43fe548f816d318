"""A recipe is the command line it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import CLIENTS, everything, glora, glora_json

RECIPE = """
out = "merged"
rank = 6
readout = [2, 4]
basis = "update"
seed = 5
normalise = true
exclude = ["*.h.1.*"]
on-bad-client = "skip"
overwrite = true

[[clients]]
path = "ann"
weight = 3

[[clients]]
name = "bert"
path = "bob"
weight = 1.5
"""


def test_a_recipe_does_what_its_options_do(work: Path) -> None:
    (work / "merge.toml").write_text(RECIPE)
    glora("aggregate", "merge.toml")
    glora("aggregate", "ann", "bert=bob", "--weights", "3,1.5", "-o", "typed", "--rank", 6,
          "--readout", "2,4", "--basis", "update", "--seed", 5, "--exclude", "*.h.1.*",
          "--on-bad-client", "skip")  # fmt: skip
    assert everything(work / "merged") == everything(work / "typed")
    facts = glora_json("aggregate", "merge.toml", "--rank", 3, "-o", "smaller")
    assert (facts["rank"], facts["out"]) == (3, "smaller")  # what is given beside it counts


def test_clients_as_plain_folders_and_as_a_list(work: Path) -> None:
    (work / "a.toml").write_text(f'out = "a"\nclients = {list(CLIENTS)}\n'.replace("'", '"'))
    (work / "list.txt").write_text("\n".join(CLIENTS))
    (work / "b.toml").write_text('out = "b"\nclients = "list.txt"\n')
    for recipe in ("a.toml", "b.toml"):
        assert [c["name"] for c in glora_json("aggregate", recipe)["clients"]] == list(CLIENTS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("rank = ", "cannot be read"),
        ("rnk = 4", "No such option"),
        ("rank = 0", "neither an integer"),
        ("basis = true", "nothing that --basis takes"),
        ("clients = [3]", "is no client"),
        ('clients = [{path = "ann", wait = 3}]', "unknown wait"),
        ('clients = [{path = "ann", weight = 3}, "bob"]', "all of them a weight"),
    ],
)
def test_recipes_refused(work: Path, content: str, says: str) -> None:
    (work / "merge.toml").write_text(f'out = "merged"\n{content}\n')
    before = everything(work)
    said = glora("aggregate", "merge.toml", *(["ann"] if "clients" not in content else []), code=2)
    assert says in " ".join(said.stderr.replace("│", "").split())
    assert everything(work) == before
    glora("aggregate", "none.toml", code=2)
