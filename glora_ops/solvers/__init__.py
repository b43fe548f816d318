"""How bases and triplets are found: one file for each method, over shared operators."""
