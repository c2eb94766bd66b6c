"""Start training and exports here, on Slurm or on Kubernetes: one Job, one module per place."""
