"""What happens inside an engine: activations layer by layer, and the keys and values of a prompt.

An engine that is traced is the engine that runs: the same graph with more outputs, or the same decoder with operations
that take notes. Nothing is written in the engine directory.
"""
