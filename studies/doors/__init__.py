"""Which door is better: PEFT's LoRA layers driven in place, or the package's own adapters?"""
