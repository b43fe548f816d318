"""Folders of adapters to a state, and a state renewed: full weights go with them."""
