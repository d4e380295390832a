"""Ours and the real libraries in one run. Invariant: every strategy gets the same weights, inputs, cap and clock.

`cases` says what is run, `subjects` builds the denoisers, `places` holds the device (its cap, clock and counters),
`ours` and `peers` apply a strategy to a module, `measure` times it, `twin` compares bits on the small model of the same
classes where the large one's values are garbage, `overhead` times the Python of a hook, `document` keeps the JSON,
`tables` and `chart` show it, `run` puts it together.
"""

from __future__ import annotations
