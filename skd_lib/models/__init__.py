"""Models: references, folders, loading, checks, vocabularies, adapters, and the records they carry.

Functions `check_...` raise `SkdError` where what they check is wrong; so do all that read, where they cannot.
"""
