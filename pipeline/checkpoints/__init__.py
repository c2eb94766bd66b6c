"""Checkpoints of a run: the folder's protocol, saving by all processes together, what is kept."""
