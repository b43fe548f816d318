"""``python -m glora_ops``: the command `glora`."""

from .cli import main

main()
