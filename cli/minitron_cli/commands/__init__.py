"""One module for each command: its arguments, one call of a room, and how the result is shown."""
