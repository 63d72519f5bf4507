"""How much of a finished LoRA can go, without data, with data, and with a few more steps? See README.md here."""
