"""Continues a prompt with the model of a run directory."""

from __future__ import annotations

import io
import json
import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = (
    'python -m experiments.generate --run_dir=runs/quickstart --prompt="def main(" --max_tokens=64',
    'python -m experiments.generate --run_dir=runs/quickstart --prompt="import " --temperature=0.8 --top_p=0.9 --json',
)


def generate(run_dir: str, prompt: str, max_tokens: int | None = None, temperature: float | None = None,
             top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
             stop: str | tuple[str, ...] | None = None, ignore_eos: bool = False, json: bool = False) -> None:
    """Prints the continuation; with `json` an object with `text`, `token_ids`, `logprobs`, `finish_reason` and counts.

    What is not given is as the model's generation_config.json says, if it has one: an imported model may want to be
    sampled. Else the most likely token is taken each time, 128 times at most.

    Args:
      run_dir: run directory of the model; it may be read-only
      prompt: text to continue, or - for standard input
      max_tokens: most tokens to generate
      temperature: divides the logits; 0 takes the most likely token
      top_k: draw among the k most likely tokens; 0 is off
      top_p: draw among the fewest tokens that sum to this probability; 1 is off
      seed: draws repeat with the same seed; by default a fresh one
      stop: string that ends the text, or several as ('a', 'b')
      ignore_eos: go on after the end token
      json: print one JSON object
    """
    from llm_jax import runs

    text = sys.stdin.read() if prompt == "-" else prompt
    with runs.load(run_dir) as run:
        got = run.complete(text, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                           stop=stop, ignore_eos=ignore_eos)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says
    print(_as_json(got) if json else got.text)


def _as_json(got) -> str:
    return json.dumps({"text": got.text, "token_ids": got.token_ids, "logprobs": got.logprobs,
                       "finish_reason": got.finish_reason, "prompt_tokens": got.usage.prompt_tokens,
                       "completion_tokens": got.usage.completion_tokens}, ensure_ascii=False)


def main(argv=None) -> int:
    """Generates; returns the exit status."""
    return cli.gin_main("experiments.generate:generate", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
