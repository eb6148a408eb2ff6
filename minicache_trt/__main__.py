"""``python -m minicache_trt`` is the command ``minicache-trt``."""

from minicache_trt.cli import main

if __name__ == "__main__":
    main()
