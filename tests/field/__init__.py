"""Programs of others' kinds, run against diffusers and against us."""
