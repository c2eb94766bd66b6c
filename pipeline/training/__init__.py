"""The parts of a run between its config and its loop."""
