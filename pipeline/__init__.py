"""Latentmill: train convolutional autoencoders on sharded data and export their latents in bulk."""

import os

__version__ = "0.1.0"
# Who started this process. Later, while torch was imported, a killed launcher may have left it to
# another: see `distributed.runtime`.
PARENT_AT_START = os.getppid()
