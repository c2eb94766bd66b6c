"""Latentmill, as programs import it."""
