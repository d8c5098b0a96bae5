"""Secure aggregation: the server learns a sum and nothing else, even if it lies (docs/threat-model.md)."""
