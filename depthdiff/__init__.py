"""Stable Diffusion 2 depth-to-image, from scratch in pure PyTorch."""
