"""What a trained model is worth: held-out losses, pictures, probes of its latents."""
