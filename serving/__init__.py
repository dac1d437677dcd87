"""The doors to a served model: gRPC and HTTP over `llm_jax.inference`, and a client, which needs no JAX."""

import os

# Else gRPC's own library writes to standard error whenever a handshake fails, whatever format the log has.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
