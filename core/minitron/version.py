"""The version of the toolkit; pyproject.toml reads it from here."""

VERSION = "0.3.0"
