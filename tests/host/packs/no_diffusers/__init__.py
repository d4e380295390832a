"""Invariant: all that this pack does is done before it is imported, in prestartup_script.py."""

NODE_CLASS_MAPPINGS: dict[str, type] = {}
