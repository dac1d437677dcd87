"""Stands for a package that the load tester imports and, as it is run here, does not use."""
