"""Lays the folders bindings/ and kernels/ into the package: glora_ops.bindings, glora_ops.kernels.

Beside the package stands `glora_command`, where the command `glora` starts.

Nothing else lives here: metadata is in pyproject.toml.
"""

from setuptools import setup

setup(
    py_modules=["glora_command"],
    packages=[
        "glora_ops",
        "glora_ops.adapters",
        "glora_ops.analysis",
        "glora_ops.bindings",
        "glora_ops.cli",
        "glora_ops.fl",
        "glora_ops.fl.configs",
        "glora_ops.fl.flower",
        "glora_ops.fl.methods",
        "glora_ops.fl.tasks",
        "glora_ops.job",
        "glora_ops.kernels",
        "glora_ops.linalg",
        "glora_ops.merging",
        "glora_ops.runtime",
        "glora_ops.solvers",
    ],
    package_dir={"glora_ops.bindings": "bindings", "glora_ops.kernels": "kernels"},
    include_package_data=False,  # MANIFEST.in is the source distribution's alone
    package_data={"glora_ops": ["py.typed"], "glora_ops.fl.configs": ["*.toml"]},
)
