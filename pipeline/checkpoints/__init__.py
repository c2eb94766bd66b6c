"""Checkpoints of a run: the files of one, saving by all processes, and which ones are kept."""
