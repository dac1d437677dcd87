"""The engine in a process of its own, and what the doors hold of it."""
