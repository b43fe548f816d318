"""The two halves of the app."""
