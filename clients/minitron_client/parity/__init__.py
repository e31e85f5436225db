"""Greedy tokens of a set of prompts, from any server of the same checkpoint, and whether two engines say the same."""
