"""Speculative Knowledge Distillation: interleaved sampling, training, evaluation and the pipeline's steps."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("skd-lib")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"
