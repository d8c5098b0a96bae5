"""The data holder's side: its data, its trainer, and the gate that decides what leaves."""
