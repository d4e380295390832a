"""Guards: importing the demo costs nothing; diffusers, transformers and scikit-learn load when a function needs them.

A small text-to-image pipeline with the SDXL component set, trained by this package's own script on scikit-learn's
digits, so that every offload mode has something real to run without a network.
"""
