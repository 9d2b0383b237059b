"""The training loop shared by all methods; `skd_lib.training.run.train` is the way in."""
