"""Safetensors files, one tensor per field."""
