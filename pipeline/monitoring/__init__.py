"""The log of a run: metrics, the ledger of its samples, bad samples, W&B."""
