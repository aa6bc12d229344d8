"""Going back to the last good state: what is kept, where, and when it is returned to."""
