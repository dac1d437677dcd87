"""Mesh, sharding rules by logical axis name, and the start of many processes."""
