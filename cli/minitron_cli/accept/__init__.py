"""A recipe judged line by line, from the tool to the served tokens."""
