"""Sound runs that look ill: what the guard costs them."""
