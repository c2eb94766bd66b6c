"""How close the pipeline comes to what the machine can do: `latentmill bench data | train`."""
