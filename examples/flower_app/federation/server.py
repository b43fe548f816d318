"""What the SuperLink runs."""

from pathlib import Path

from glora_ops.fl.flower import server_app

app = server_app(Path(__file__).parent)
