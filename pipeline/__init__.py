"""Latentmill: train convolutional autoencoders on sharded data and export their latents in bulk."""

__version__ = "0.1.0"
