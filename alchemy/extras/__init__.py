"""Optional parts: deleting one breaks nothing but its own flags."""
