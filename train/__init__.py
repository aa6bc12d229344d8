"""Train decoders under the guard: model, LoRA, data, loop, and one script per job."""
