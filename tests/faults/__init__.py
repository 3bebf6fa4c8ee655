"""One-line faults for tests/mutations.py, a table per area.

FAULTS = {(module below alchemy/, test files below tests/): ((what, old text, new text), ...)}
"""
