"""What the guard, the rollback and the scripts cost in time and memory."""
