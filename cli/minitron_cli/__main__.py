"""``python -m minitron_cli``, the same as ``minitron``."""

from minitron_cli.main import entry

entry()
