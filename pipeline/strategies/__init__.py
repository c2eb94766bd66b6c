"""Ways to distribute a model over processes: plain or DDP (`ddp`)."""
