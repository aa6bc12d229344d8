"""Final perplexity over the learning rate: the guard against AdamW and its peers."""
