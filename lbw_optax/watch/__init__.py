"""``lbw-watch``: a run in the terminal while it goes on, and orders for it.

- `command`: the command and its loop.
- `following`: what the run has written since the last look.
- `screen`: what is shown of it.
- `keyboard`: keys of a terminal, without waiting.
"""
