"""The compiled kernels of the CPU backend; everything else about the package is in pyproject.toml.

They are optional: without a C++ compiler the package installs all the same, and engines run their operators as ONNX
functions.
"""

from pathlib import Path

from setuptools import Extension, setup

PLUGINS = Path("plugins")

setup(
    ext_modules=[
        Extension(
            "minicache_trt._cpu_kernels",
            sources=[
                str(PLUGINS / "cpu" / "kernels.cpp"),
                *(str(PLUGINS / "onnxruntime" / f"{name}.cpp") for name in ("attributes", "operator", "register")),
            ],
            include_dirs=[str(PLUGINS), str(PLUGINS / "include"), str(PLUGINS / "src")],
            depends=[str(path) for pattern in ("**/*.inl", "**/*.h", "**/*.cuh") for path in PLUGINS.glob(pattern)],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)
