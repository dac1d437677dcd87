"""docs/families.md: what a run of tests/parity measured."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "families.md"

# family of the table -> its title
TITLES = {
    "llama": "Llama 2, 3, 3.1+", "mistral": "Mistral", "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3", "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)", "phi3": "Phi-3, Phi-4-mini", "gpt2": "GPT-2", "glm4": "GLM-4", "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE", "deepseek_v3": "DeepSeek-V3", "bert": "BERT", "t5": "T5", "flan_t5": "T5 1.1, Flan-T5",
}
_TEXT = """# Families

Hugging Face checkpoints of these families go in and out (`experiments.import_hf`, `experiments.export_hf`,
`llm_jax.hf`), and compute what `transformers` computes. This page is written by `make test-parity`: for each family,
models of random shapes with random weights, drawn afresh in every run, against the live library in float32 on the CPU.

| family | largest logit difference | relative to largest logit | gradient difference | KL of next tokens | parameters |
|---|--:|--:|--:|--:|--:|
{rows}

Each line is the worst of {draws} drawn models.

- **Logits**: over every position that is not padding, of rows of unlike lengths in one batch, and of documents packed
  into one row, against one unpadded forward a row. BERT's are those of the masked-LM head; its next-sentence logits are
  held to the same bound.
- **Gradient**: of the mean cross-entropy, tensor by tensor of the checkpoint: the largest difference divided by the
  tensor's own largest entry, worst tensor of all; the bound is 1e-3. (A gradient that is 0 in exact arithmetic, such as
  that of the bias of BERT's keys, has to be under 2e-5 of the model's largest in both.)
- **KL**: from `transformers`' distribution of the next token to ours, in nats, mean over positions, computed in float64
  from float32 logits.
- **Parameters**: of the largest model drawn, the same number in both libraries.

Every model is also exported, by `hf.save` or through a run directory: each tensor comes back bit for bit, and
`transformers` loads the folder with no key missing or left over, and computes the same logits from it. Heads for
sequences and tokens, on several families, pass the same tests. The default tests compare with files of each family that
are kept in `tests/golden`, without torch.

Command: `make test-parity SEED={seed}`, {date}. transformers {transformers}, torch {torch}, jax {jax}, flax {flax},
Python {python}, {machine}.
"""


@dataclasses.dataclass
class Result:
    """The worst seen of a family."""

    absolute: float = 0.0
    relative: float = 0.0
    gradient: float = 0.0
    kl: float = 0.0
    parameters: int = 0
    draws: int = 0

    def add(self, other: Result) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, mine + theirs if field.name == "draws" else max(mine, theirs))


def write(results: dict[str, Result], seed: int) -> None:
    """Writes docs/families.md."""
    rows = []
    for name, title in TITLES.items():
        r = results[name]
        rows.append(f"| {title} | {r.absolute:.1e} | {r.relative:.1e} | {r.gradient:.1e} | {max(r.kl, 0.0):.1e} | "
                    f"{r.parameters:,} |")
    version = importlib.metadata.version
    text = _TEXT.format(
        rows="\n".join(rows), draws=min(r.draws for r in results.values()), seed=seed,
        date=datetime.date.today().isoformat(), python=platform.python_version(),
        machine=f"{os.cpu_count()} {platform.machine()} cores",
        **{name: version(name) for name in ("transformers", "torch", "jax", "flax")})
    new = DOCS.with_suffix(".new")
    new.write_text(text)
    os.replace(new, DOCS)
