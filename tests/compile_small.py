"""Compile-only cases of the small dense problems: canonical forms, eigenproblem, SVD."""
