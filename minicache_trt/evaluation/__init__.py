"""Quality of compressed caches: streaming perplexity, long-range tasks, lm-eval-harness, side by side."""
