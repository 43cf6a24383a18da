"""Equivariant networks that the experiments train, each written from its equations on standard layers."""
