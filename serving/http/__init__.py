"""The HTTP door: OpenAI's interface, a WebSocket, the operator's pages."""
