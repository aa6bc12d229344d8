"""Faults put into training runs: who survives them, and at what price."""
