"""The faults of faults.py in the rooms around the core."""

FAULTS = {
    ("command/results", "cli/sample"): (
        ("a picture tells where it was written", "if k not in PLACES}", "}"),
    ),
}
