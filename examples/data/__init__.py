"""Data sets that the experiments train on: simulated here, or read from a file that the caller names."""
