"""Benchmarks: one script per question; results and the tables made from them lie next to them."""
