"""Can one DyLoRA run replace a LoRA run at every rank? See README.md in this folder."""
