"""What is minimised: the objective and its terms."""
