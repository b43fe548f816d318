"""What every SuperNode runs."""

from glora_ops.fl.flower import client_app

app = client_app()
