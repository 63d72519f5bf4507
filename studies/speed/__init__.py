"""What does choosing ranks cost, beside plain LoRA, PEFT's AdaLoRA and a frozen model? See README.md in this folder."""
