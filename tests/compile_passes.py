"""Compile-only cases of the kernels that read or write the long dimension."""
