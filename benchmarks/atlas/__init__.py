"""A distribution of small training tasks: does a guarded run end where the tuned one ends?"""
