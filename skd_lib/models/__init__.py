"""Models: references, folders, loading, checks, vocabularies, adapters, and the records they carry."""
