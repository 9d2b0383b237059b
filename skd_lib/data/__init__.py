"""Data: sources, splits, prepared data, and the rendering and tokenisation of examples.

Functions `check_...` raise `SkdError` where what they check is wrong; so do all that read, where they cannot.
"""
