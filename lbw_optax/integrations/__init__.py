"""Other people's training loops: what passes them the guard, or the guard their loss.

One small module a framework, imported by name (``from lbw_optax.integrations import keras``), and
none where a line of Optax is enough. See the page *Your framework*.
"""
