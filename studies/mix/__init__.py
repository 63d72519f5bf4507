"""Does a router over finished adapters beat one adapter for all? And bottlenecks beside LoRA, at equal size."""
