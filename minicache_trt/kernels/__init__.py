"""Binding of the kernels of ``plugins/`` by ctypes: one C ABI for the CUDA library and for its host build."""
