"""The pytest-benchmark rows of bench/test_gpu.py, into rows.json; as long as it is given."""

from __future__ import annotations

from pathlib import Path

from gpu.step import Step, main

ROWS = Path(__file__).resolve().parents[1] / "test_gpu.py"


def body(step: Step) -> None:
    import pytest

    with step.row(rows="rows.json") as r:
        status = pytest.main(
            ["-p", "no:cacheprovider", f"--benchmark-json={step.out / 'rows.json'}", str(ROWS)]
        )
        r["ok"] = status == 0


if __name__ == "__main__":
    main(body)
