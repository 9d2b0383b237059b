"""`python -m pipelines.cli` is `skd`."""

from pipelines.cli import main

main()
