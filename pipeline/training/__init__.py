"""What a run is built from: between the config and the training loop."""
