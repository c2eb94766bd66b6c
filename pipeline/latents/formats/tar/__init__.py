"""Webdataset tars, one `.npy` member per field and sample."""
