"""Launch scripts: each parses its flags, binds Gin where it uses it, and calls the library once."""
