"""Ways to distribute a model over processes: plain or DDP (`ddp`), ZeRO-1 to 3 (`zero`)."""
