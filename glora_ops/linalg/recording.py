"""CUDA graphs: tensors that outlive a call are not made while one is recorded."""

from __future__ import annotations

import torch

from ..errors import unfit

__all__ = ["refuse_in_recording"]


def refuse_in_recording(what: str, device: torch.device) -> None:
    """Raise where a CUDA graph is being recorded.

    Raises
    ------
    GloraError
        `what` is to be made and kept for later calls, and would be in memory that the graph owns.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise unfit(
            what,
            "its first use while a CUDA graph is recorded",
            "one at the same shapes before",
            "call once, then record",
        )
