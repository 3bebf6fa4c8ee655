"""What the three scripts do once their flags are read."""
