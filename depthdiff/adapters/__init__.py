"""Small files that change a model: LoRA and its kin, and words learnt by textual inversion."""
