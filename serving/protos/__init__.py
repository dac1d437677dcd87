"""Protocol descriptions; `serving.messages` holds the classes."""
