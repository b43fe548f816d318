"""Folders of adapters into a state, a state for other clients, an adapter into its base."""
