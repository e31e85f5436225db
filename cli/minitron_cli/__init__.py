"""The command ``minitron``: the only room that knows all others."""
