"""The four networks, one file each."""
