"""What a stage leaves: its manifest, and whether what it names is still so."""
