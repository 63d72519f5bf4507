"""What do shrinking and extracting adapters cost in time and memory? See README.md in this folder."""
