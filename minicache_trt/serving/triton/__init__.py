"""Engines as models of Triton Inference Server.

tensors       every tensor of the model, once
settings      what config.pbtxt says beside them
repository    writes both, an engine and the shim into a model repository
shim          the ``model.py`` of a repository; calls `model`
model         one instance: its engine, its requests, its end
parameters    from tensors to prompts and sampling parameters
answers       from outputs to tensors
calls         one request from its arrival to its last response
metrics       what Triton's metrics endpoint shows
"""
