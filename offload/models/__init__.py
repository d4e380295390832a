"""Invariant: real model shapes from JSON configs in this folder; building one costs no RAM and downloads nothing."""
