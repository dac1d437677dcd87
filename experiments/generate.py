"""Continues one prompt, or many together, with the model of a run directory."""

from __future__ import annotations

import io
import json
import pathlib
import sys
from typing import Any

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402
from llm_jax.errors import UserError  # noqa: E402

EXAMPLES = (
    'python -m experiments.generate --run_dir=runs/quickstart --prompt="def main(" --max_tokens=64',
    'python -m experiments.generate --run_dir=runs/quickstart --prompt="import " --temperature=0.8 --min_p=0.05 --n=4',
    "python -m experiments.generate --run_dir=runs/quickstart --prompts_file=prompts.txt --json > answers.jsonl",
    'python -m experiments.generate --run_dir=runs/quickstart --prompt="A date: " --regex="[0-9]{4}-[0-9]{2}-[0-9]{2}"',
)


def generate(run_dir: str, prompt: str | None = None, prompts_file: str | None = None, max_tokens: int | None = None,
             temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
             min_p: float | None = None, repetition_penalty: float | None = None,
             presence_penalty: float | None = None, frequency_penalty: float | None = None,
             logit_bias: dict | None = None, seed: int | None = None, stop: str | tuple[str, ...] | None = None,
             stop_ids: int | tuple[int, ...] | None = None, min_tokens: int | None = None, ignore_eos: bool = False,
             json_schema: str | None = None, regex: str | None = None, grammar: str | None = None,
             logprobs: int | None = None, prompt_logprobs: int | None = None, n: int = 1, best_of: int | None = None,
             step: str | None = None, json: bool = False) -> None:
    """Prints the continuation; with `json` an object with `text`, `token_ids`, `logprobs`, `finish_reason` and counts.

    What is not given is as the model's generation_config.json says, if it has one: an imported model may want to be
    sampled. Else the most likely token is taken each time, 128 times at most.

    Args:
      run_dir: run directory of the model; it may be read-only
      prompt: text to continue, or - for standard input
      prompts_file: file of prompts instead, one a line; a line that is a JSON string stands for what that says
      max_tokens: most tokens to generate
      temperature: divides the logits; 0 takes the most likely token
      top_k: draw among the k most likely tokens; 0 is off
      top_p: draw among the fewest tokens that sum to this probability; 1 is off
      min_p: draw among the tokens at least this times as likely as the likeliest; 0 is off
      repetition_penalty: divides the logits of tokens that the text has already; 1 is off
      presence_penalty: taken from the logits of tokens that the completion has already
      frequency_penalty: the same, for each time that it has them
      logit_bias: amounts added to tokens' logits, as {42: -100}
      seed: draws repeat with the same seed; by default a fresh one
      stop: string that ends the text, or several as ('a', 'b')
      stop_ids: token that ends it, or several as (5, 6)
      min_tokens: no end before so many tokens
      ignore_eos: go on after the end token
      json_schema: file with a JSON schema; the completion is JSON of that schema
      regex: expression that the completion matches
      grammar: file with a grammar (Lark) that the completion belongs to
      logprobs: with --json, so many of the likeliest tokens beside each
      prompt_logprobs: with --json, log-probabilities of the prompt's tokens, and of so many of the likeliest
      n: completions of each prompt
      best_of: draw so many of each, and print the n likeliest
      step: checkpoint to take: a step, best or good; by default the latest
      json: print one JSON object a completion, each on its line
    """
    from llm_jax import runs

    prompts = _prompts(prompt, prompts_file)
    constraint = _constraint(json_schema, regex, grammar)
    with runs.load(run_dir, step) as run:
        found = run.complete(
            prompts, n=n, best_of=best_of, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias, seed=seed, stop=stop,
            stop_ids=(stop_ids,) if isinstance(stop_ids, int) else stop_ids, min_tokens=min_tokens,
            ignore_eos=ignore_eos, constraint=constraint, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says
    flat = [got for each in found for got in each]
    if failed := next((got.error for got in flat if got.finish_reason == "error"), None):
        raise UserError(failed)
    for i, got in enumerate(flat, 1):
        if json:
            print(_as_json(got))
        else:
            print(f"--- {i} of {len(flat)}\n{got.text}" if len(flat) > 1 else got.text)


def _prompts(prompt: str | None, file: str | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise UserError("give a --prompt or a --prompts_file")
    if file is None:
        assert prompt is not None
        return [sys.stdin.read() if prompt == "-" else prompt]
    text = _read("prompts_file", file).removesuffix("\n")
    prompts = []
    for number, line in enumerate(text.split("\n") if text else (), 1):
        value: Any = line
        if line[:1] == '"':
            try:
                value = json.loads(line)
            except ValueError:
                raise UserError(f"{file}: line {number} begins with a quotation mark and is no JSON string") from None
        prompts.append(value)
    if not prompts:
        raise UserError(f"{file} has no prompts")
    return prompts


def _constraint(json_schema: str | None, regex: str | None, grammar: str | None) -> Any:
    from llm_jax.inference.request import Constraint

    given = [(kind, value) for kind, value in (("json_schema", json_schema), ("regex", regex), ("grammar", grammar))
             if value is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0][0]} and --{given[1][0]} exclude each other")
    if not given:
        return None
    kind, value = given[0]
    return Constraint(kind, value if kind == "regex" else _read(kind, value))


def _read(flag: str, path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _as_json(got: Any) -> str:
    told = {"text": got.text, "token_ids": got.token_ids, "logprobs": got.logprobs, "finish_reason": got.finish_reason,
            "prompt_tokens": got.usage.prompt_tokens, "completion_tokens": got.usage.completion_tokens}
    if got.top_logprobs:
        told["top_logprobs"] = got.top_logprobs
    if got.prompt_logprobs:
        told["prompt_logprobs"] = [{"token_id": p.token_id, "logprob": p.logprob, "top": p.top}
                                   for p in got.prompt_logprobs]
    return json.dumps(told, ensure_ascii=False)


def main(argv=None) -> int:
    """Generates; returns the exit status."""
    return cli.gin_main("experiments.generate:generate", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
