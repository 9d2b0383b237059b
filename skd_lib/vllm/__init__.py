"""SKD's sampler inside vLLM: a server holds teacher and student, the training speaks HTTP to it.

`worker`, `runner_v1`, `runner_v2`, `weights` and `guard` run in the server, in an environment with vLLM; the others run
in the training, which has none.
"""
