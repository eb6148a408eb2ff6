"""From a checkpoint and a text to the compression plan that costs the model least: moments, candidates, search."""
