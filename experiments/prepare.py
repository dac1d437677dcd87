"""Prepares text for training: reads a corpus, splits it, trains a tokenizer and writes token shards with a manifest.

The same command again finds everything done. Other settings want another DATA_DIR, or FORCE=True to replace the data.
"""

from __future__ import annotations

import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Runs `llm_jax.data.prepare.prepare` with what Gin binds."""
    return cli.gin_main("llm_jax.data.prepare:prepare", ["gin/data/quickstart.gin"], argv,
                        description=__doc__, examples=[
        "python -m experiments.prepare",
        "python -m experiments.prepare --gin.CORPUS=\"'/path/to/texts'\" --gin.DATA_DIR=\"'data/mine'\"",
        "python -m experiments.prepare --gin.CORPUS=\"['/path/a', '/path/b.jsonl.zst']\" "
        "--gin.DATA_DIR=\"'data/both'\" --gin.VOCAB_SIZE=16384",
    ])


if __name__ == "__main__":
    sys.exit(cli.run(main))
