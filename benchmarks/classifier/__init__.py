"""How well divergence is predicted: the classifier and published rules, on made and real runs."""
