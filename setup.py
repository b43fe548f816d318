"""Lays the top-level folder bindings/ into the package as glora_ops.bindings.

Nothing else lives here: metadata is in pyproject.toml.
"""

from setuptools import setup

setup(
    packages=[
        "glora_ops",
        "glora_ops.adapters",
        "glora_ops.bindings",
        "glora_ops.cli",
        "glora_ops.fl",
        "glora_ops.fl.flower",
        "glora_ops.fl.methods",
        "glora_ops.fl.tasks",
    ],
    package_dir={"glora_ops.bindings": "bindings"},
    package_data={"glora_ops": ["py.typed"], "glora_ops.fl": ["configs/*.toml"]},
)
