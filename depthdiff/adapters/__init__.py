"""Small files that change a model: LoRA, LoHa, LoKr, DoRA and textual inversion."""
