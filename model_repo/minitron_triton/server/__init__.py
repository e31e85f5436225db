"""Triton as a process or a container: started, watched, drained, ended, and what a killed one left."""
