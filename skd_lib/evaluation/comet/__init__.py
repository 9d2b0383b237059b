"""COMET (Rei et al. 2020, arXiv 2009.09025): a learned metric of translations, in an environment of its own.

`unbabel-comet` needs transformers < 5 and numpy < 2, which this library cannot use. So another
interpreter (`environment`) runs one small program that imports nothing of this library (`worker`).
"""
