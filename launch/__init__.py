"""Start training and exports on this machine, Slurm or Kubernetes: one Job, one file per place."""
