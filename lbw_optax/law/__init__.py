"""The control law: from the signals of a step to what is done about it, as pure functions."""
