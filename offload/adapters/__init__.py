"""Invariant: the files in this folder are the only ones that know a host's or a library's internals."""
