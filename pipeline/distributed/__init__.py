"""Several processes as one: start and meeting, outcome, watchdog, strategies, the optimizer."""
