"""Tests that run diffusers and transformers beside this package."""
