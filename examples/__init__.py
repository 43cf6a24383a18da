"""Runnable experiments: short scripts, the models that they train, and the data that they train on."""
