"""TensorRT and TensorRT-RTX: one implementation over two Python modules with the same names.

    decoder.onnx ──parse──► network ──profiles, flags──► builder ──► decoder.engine ──► contexts, CUDA graphs

Building is `build`, running `engine`. Whatever depends on the module takes it as an argument, so that tests pass a
module of their own.
"""
