"""A short slice of `make fuzz`, and every input that once was a finding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import CASES, drawn, inputs, judged, read_case
from targets import TARGETS

COUNT = 400


@pytest.mark.parametrize("part", range(2))
def test_odd_inputs_are_done_or_refused(part: int) -> None:
    counts, findings = inputs(1, range(part, COUNT, 2))
    assert not [(f["target"], f["why"]) for f in findings]
    kinds = {kind for _, kind in counts}
    assert kinds >= {"done", "refused"}
    assert {target for target, _ in counts} >= TARGETS.keys() - {"command"}


@pytest.mark.parametrize("case", sorted(CASES.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_found_stays_mended(case: Path) -> None:
    target, files = read_case(case)
    if target not in TARGETS:
        pytest.skip("needs Python 3.11")
    assert judged(target, files)[0] in ("done", "refused", "usage", "not a message")


def test_an_input_is_decided_by_its_seed_and_number() -> None:
    assert drawn(7, 11) == drawn(7, 11)
    assert drawn(7, 11) != drawn(8, 11)
