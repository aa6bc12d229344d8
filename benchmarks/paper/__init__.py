"""The table of the paper, reproduced."""
