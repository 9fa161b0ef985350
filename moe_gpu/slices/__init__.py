"""Slices of a GPU: what a device can be cut into, plans, the policies that choose them, and what carries them out."""
