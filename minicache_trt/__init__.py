"""Engines with a cross-layer compressed, paged KV cache from Hugging Face checkpoints."""
