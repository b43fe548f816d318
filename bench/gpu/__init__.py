"""The steps of `gpu_run.py`, each a process of its own; `lines` and `parent` know no torch."""
