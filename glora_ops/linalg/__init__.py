"""The ground: ragged rows, canonical forms, orthonormal bases, and the words a device supplies."""
