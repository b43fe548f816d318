"""Triton kernels and their launchers; README.md beside this file describes them.

Importing a module here imports Triton: `glora_ops.bindings.cuda` does so when the first CUDA
tensor arrives. Nothing here knows the algorithm.
"""
