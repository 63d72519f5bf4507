"""What turns the package itself into reference pages when the site is built. Each module makes Markdown text."""
