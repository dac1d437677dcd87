"""What a preparation found and made, in a few lines for a person."""

from __future__ import annotations

from llm_jax.data.splits import SPLITS


def summary(data_dir: str, manifest: dict, reused: bool, seconds: float) -> str:
    """The lines that `experiments/prepare.py` prints.

    Args:
      data_dir: the prepared directory.
      manifest: its manifest.
      reused: whether everything was there already.
      seconds: how long it took.
    """
    corpus, wanted = manifest["corpus"], manifest["settings"]["vocab_size"]
    done = "already prepared" if reused else "prepared"
    lines = [f"{done}: {data_dir} ({seconds:.1f} s)",
             f"corpus      {', '.join(corpus['parts'])}: {corpus['files']:,} files, {_size(corpus['bytes'])}"]
    for split in SPLITS:
        facts = manifest["splits"][split]
        lines.append(f"{split:<11} {facts['documents']:>9,} documents {facts['tokens']:>13,} tokens "
                     f"{_size(facts['bytes']):>10} of text, {len(facts['shards'])} shard(s)")
    vocab = f"{manifest['vocab_size']:,} tokens"
    if wanted is None:
        vocab += " of the given tokenizer"
    elif manifest["vocab_size"] < wanted:
        vocab += f" (the text has no more than that; {wanted:,} were asked for)"
    total = {name: sum(manifest["splits"][split][name] for split in SPLITS) for name in ("bytes", "tokens")}
    lines.append(f"vocabulary  {vocab}, {total['bytes'] / total['tokens']:.2f} bytes per token")
    lines.append(f"unigram     {manifest['unigram_bits_per_byte']:.3f} bits per byte on validation")
    lines.append(f"sources     {len(manifest['sources']):,}")
    if manifest["skipped"]:
        lines.append("left out")
        for reason, facts in manifest["skipped"].items():
            examples = f": {', '.join(facts['examples'][:3])}" if facts["examples"] else ""
            more = ", …" if examples and facts["count"] > 3 else ""
            lines.append(f"  {facts['count']:>7,} × {reason}{examples}{more}")
    # File names need not be valid Unicode, and a terminal takes nothing else.
    return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    return f"{count:.3g} TB"
