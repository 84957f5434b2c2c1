"""The entries of the losses, one file per family."""
