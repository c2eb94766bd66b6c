"""Start training and export where the processes and machines are: one Job, one file per place."""
