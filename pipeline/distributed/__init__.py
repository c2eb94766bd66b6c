"""Several processes as one: start and rendezvous, outcome, watchdog, strategies, the optimizer."""
