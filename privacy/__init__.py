"""Differential privacy without a framework: noise, events, accounting, the ledger and its audit."""
