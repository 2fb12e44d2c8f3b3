"""Tests of the fast computations: each against the plain one, and only where it may stand for it."""
