"""The model: backbones, bottlenecks and the autoencoder made of them."""
