"""Planning: what a recipe needs and what can be expected of it, computed from sizes alone, before anything is built."""
