"""Evaluation of trained models: held-out losses, pictures, probes of latents."""
