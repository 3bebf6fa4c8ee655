"""The faults that mutations.py puts into the code, one at a time.

(file in alchemy/, the test files to run): (what it is, the exact old text, the new text), ...
"""

FAULTS = {}
