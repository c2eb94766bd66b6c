"""What a run says of itself: metrics, the ledger of its samples, bad samples, W&B."""
