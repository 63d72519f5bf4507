"""Do LoRA's variants reach plain LoRA on a task where rank matters? See README.md in this folder."""
