"""The results of one run, for a person and for a program."""
