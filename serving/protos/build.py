"""Compiles the .proto files of this folder into `descriptors.binpb`, which `serving/messages.py` loads at run time.

Only someone who edits a .proto needs it, with a compiler that the project itself does not install:

    pip install grpcio-tools==1.71.2
    python serving/protos/build.py

A descriptor set, rather than generated Python, is kept because generated code is tied to a range of protobuf versions
and registers itself in the process-wide pool, where it would clash with google-jetstream's own copy.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent
SOURCES = ("jetstream.proto", "llm_jax_serving_v1.proto")
OUTPUT = FOLDER / "descriptors.binpb"


def build() -> int:
    """Runs protoc over `SOURCES`; returns its exit status and leaves `OUTPUT` as it was if that is not 0."""
    unfinished = OUTPUT.with_suffix(".tmp")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={FOLDER}", "--include_imports",
               f"--descriptor_set_out={unfinished}", *SOURCES]
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        os.replace(unfinished, OUTPUT)
    return status


if __name__ == "__main__":
    sys.exit(build())
