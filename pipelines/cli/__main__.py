"""`python -m skd_kfp.pipelines.cli` is `skd`."""

from skd_kfp.pipelines.cli import main

main()
