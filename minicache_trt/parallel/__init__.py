"""Tensor parallelism: one engine over several processes, each with its share of heads and columns."""
