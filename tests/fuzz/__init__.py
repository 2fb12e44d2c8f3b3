"""Seeded random tests: every outcome is a result, or an error that this package raises itself."""
