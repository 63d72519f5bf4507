"""How often is an audit wrong, and how often does it find what is there? See README.md in this folder."""
