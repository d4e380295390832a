"""A batch through a host's API. Invariant: it talks HTTP and files alone: no torch, no host, no node is imported here.

workflow.py (the graph and its inputs) -> values.py, tables.py (what --set names) -> items.py (the batch) -> runner.py
(submit, watch, record), which uses server.py (the host's API), outcome.py (what became of a prompt), journal.py (what
a restart needs), results.py (the rows) and progress.py (what people see).
"""
