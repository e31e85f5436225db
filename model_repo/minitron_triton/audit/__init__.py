"""A running server held against what its repository and its plan meant."""
