"""From published files to networks and back."""
