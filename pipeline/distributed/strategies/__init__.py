"""How a model is distributed over processes: DDP (`ddp`) or ZeRO-1 to 3 (`zero`)."""
