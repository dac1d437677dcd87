"""`python -m serving.client`: the client on a command line."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.inference.request import CONSTRAINTS, Constraint, PromptLogprob, TopLogprobs
from serving import client

EXAMPLES = """examples:
  python -m serving.client --prompt="def main(" --max_tokens=64 --temperature=0.8 --min_p=0.05
  python -m serving.client --prompt="从前" --num_samples=2 --best_of=8 --temperature=1 --json
  python -m serving.client --prompt="A person as JSON: " --json_schema=person.json
  python -m serving.client --prompt="Yes or no? " --regex="yes|no" --top_logprobs=5 --json
  python -m serving.client --prompt="def main(" --prompt="import os" --embed=mean

environment:
  LLM_JAX_API_KEY  the API key, where the server asks for one (on the command line others could read it)
"""
API_KEY = "LLM_JAX_API_KEY"
# Flags by the type of their value, each named like the argument of `Client.generate`.
_FLOATS = {
    "temperature": "0 takes the likeliest token each time; by default as the model came configured, else 0",
    "top_p": "draw among the likeliest that hold this probability",
    "min_p": "draw among those at least this times as likely as the likeliest",
    "repetition_penalty": "divides the logits of tokens that the text has already; 1 is off",
    "presence_penalty": "taken from the logits of tokens that the completion has already",
    "frequency_penalty": "the same, for each time that it has them",
    "deadline_seconds": "end with what there is after so long",
}
_WHOLE = {
    "top_k": "draw among this many likeliest tokens; 0 is off",
    "seed": "the same seed draws the same tokens",
    "min_tokens": "no end before so many tokens",
    "top_logprobs": "with --json: so many of the likeliest tokens beside each",
    "prompt_logprobs": "with --json: log-probabilities of the prompt's tokens, and of so many of the likeliest",
    "num_samples": "completions of the prompt; printed one after another when all have finished",
    "best_of": "draw so many and print the likeliest --num_samples of them",
    "priority": "larger goes first among the requests that wait",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 after an error that was told in one line, 130 after Ctrl-C."""
    args = _parse(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says, or Chinese could not be printed
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # e.g. `| head`: nobody reads on, so there is nothing left to flush at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.client", allow_abbrev=False, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Stream a completion from a server to the terminal.")
    add = parser.add_argument
    add("--address", default="127.0.0.1:9000", help="host:port of the server")
    add("--prompt", required=True, action="append",
        help="text to continue; - reads it from standard input (repeatable with --embed)")
    add("--max_tokens", type=int, default=128, help="new tokens, at most; 0 is as many as fit")
    for kind, flags in ((float, _FLOATS), (int, _WHOLE)):
        for name, words in flags.items():
            add(f"--{name}", type=kind, default=None, help=words)
    add("--stop", action="append", default=[], help="end before this text (repeatable)")
    add("--stop_id", action="append", type=int, default=[], help="end at this token (repeatable)")
    add("--logit_bias", action="append", default=[], metavar="ID=AMOUNT",
        help="add to a token's logit, from -100 to 100 (repeatable)")
    add("--ignore_eos", action="store_true", help="go on after the end token")
    add("--json_schema", metavar="FILE", help="the completion must be JSON of this schema")
    add("--regex", help="the completion must match this expression")
    add("--grammar", metavar="FILE", help="the completion must belong to this grammar (Lark)")
    add("--tenant", default="",
        help="whose request it is, for a server without API keys: computed prompts are used again within one alone")
    add("--embed", choices=("mean", "last"), help="print the prompts' embeddings instead, a line of JSON each")
    add("--json", action="store_true", help="print one JSON object a sample at the end instead of streaming")
    add("--jetstream", action="store_true",
        help="speak JetStream's protocol (greedy unless the server was told otherwise)")
    add("--tls", action="store_true", help="the server speaks TLS, with a certificate that this system trusts")
    add("--tls_ca", metavar="FILE", help="PEM file of the authorities that may sign the server's certificate")
    add("--tls_cert", metavar="FILE", help="PEM file of a certificate to show to the server")
    add("--tls_key", metavar="FILE", help="PEM file of its private key")
    add("--timeout", type=float, default=None, help="give up after this many seconds")
    return parser.parse_args(argv)


def _argument_text(argument: str) -> str:
    """What was typed: without a Unicode locale Python holds an argument's bytes as lone surrogates."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"an argument is not UTF-8 (byte {error.start} of {argument!r})") from None


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return _argument_text(prompt)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start})") from None


def _bias(given: Sequence[str]) -> dict[int, float]:
    try:
        return {int(name): float(amount) for name, _, amount in (one.partition("=") for one in given)}
    except ValueError:
        raise UserError(f"--logit_bias must be ID=AMOUNT, such as 42=-100, not {given[-1]!r}") from None


def _constraint(args: argparse.Namespace) -> Constraint | None:
    given = [kind for kind in CONSTRAINTS if getattr(args, kind) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other")
    if not given:
        return None
    value = _argument_text(getattr(args, given[0]))
    if given[0] == "regex":
        return Constraint("regex", value)
    try:
        with open(value, encoding="utf-8") as file:
            return Constraint(given[0], file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{given[0]}: cannot read {value}: {getattr(error, 'strerror', None) or error}") from None


def _chunks(server: client.Client, args: argparse.Namespace, prompt: str) -> Iterator[client.Chunk]:
    asked: dict[str, Any] = {name: value for name in (*_FLOATS, *_WHOLE)
                             if (value := getattr(args, name)) is not None}
    asked |= {"stop": [_argument_text(stop) for stop in args.stop], "stop_ids": args.stop_id,
              "logit_bias": _bias(args.logit_bias), "ignore_eos": args.ignore_eos,
              "tenant": _argument_text(args.tenant), "constraint": _constraint(args)}
    if args.jetstream:
        given = [name for name, value in asked.items() if value and name not in ("priority", "num_samples")]
        given += [name for name in ("temperature", "top_k") if asked.get(name) == 0]
        if given:
            raise UserError(f"JetStream's protocol has no field for --{given[0]}; leave out --jetstream")
        return server.decode(prompt, max_tokens=args.max_tokens, num_samples=args.num_samples or 1,
                             priority=args.priority or 0)
    return server.generate(prompt, max_tokens=args.max_tokens, logprobs=args.json, **asked)


class _Sample:
    """One sample, as much of it as has arrived."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.prompt: list[PromptLogprob] = []
        self.last: client.Chunk | None = None

    def add(self, chunk: client.Chunk) -> None:
        """Appends what came next."""
        self.text.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.top.extend(chunk.top_logprobs)
        self.prompt.extend(chunk.prompt_logprobs)
        self.last = chunk

    def as_json(self, seconds: float, first_token_s: float) -> str:
        """All of it on a line."""
        last = self.last or client.Chunk(0, "", ())
        told: dict[str, Any] = {
            "text": "".join(self.text), "token_ids": self.token_ids, "logprobs": self.logprobs,
            "finish_reason": last.finish_reason, "prompt_tokens": last.prompt_tokens,
            "completion_tokens": len(self.token_ids), "cached_tokens": last.cached_tokens}
        if self.top:
            told["top_logprobs"] = self.top
        if self.prompt:
            told["prompt_logprobs"] = [
                {"token_id": p.token_id, "logprob": p.logprob, "top": p.top} for p in self.prompt]
        told |= {"time_to_first_token_s": round(first_token_s, 6),
                 "tokens_per_second": round(len(self.token_ids) / seconds, 3)}
        return json.dumps(told, ensure_ascii=False)


def _run(args: argparse.Namespace) -> None:
    if len(args.prompt) > 1 and not args.embed:
        raise UserError("one --prompt at a time is continued; several are for --embed")
    prompts = [_read_prompt(prompt) for prompt in args.prompt]
    tls = {name: getattr(args, name) for name in ("tls", "tls_ca", "tls_cert", "tls_key")}
    with client.Client(args.address, api_key=os.environ.get(API_KEY) or None, **tls,
                       connect_timeout_s=client.CONNECT_TIMEOUT_S, timeout_s=args.timeout) as server:
        if args.embed:
            for vector in server.embed(prompts, args.embed):
                print(json.dumps({"embedding": [float(f"{x:.8g}") for x in vector]}))
            return
        started = time.perf_counter()
        first_token_at = None
        samples: dict[int, _Sample] = {}
        streams = not args.json and (args.num_samples or 1) == 1
        for chunk in _chunks(server, args, prompts[0]):
            if chunk.token_ids and first_token_at is None:
                first_token_at = time.perf_counter()
            samples.setdefault(chunk.sample, _Sample()).add(chunk)
            if streams:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        seconds = time.perf_counter() - started
    first_token_s = first_token_at - started if first_token_at else seconds
    found = [sample for _, sample in sorted(samples.items())] or [_Sample()]
    if args.json:
        for sample in found:
            print(sample.as_json(seconds, first_token_s))
        return
    if not streams:
        print("\n".join(f"--- {i} of {len(found)}\n{''.join(s.text)}" for i, s in enumerate(found, 1)), end="")
    print(flush=True)
    reasons = dict.fromkeys((sample.last and sample.last.finish_reason) or "end of stream" for sample in found)
    tokens = sum(len(sample.token_ids) for sample in found)
    print(f"[{', '.join(reasons)}; {tokens} tokens; first after {first_token_s * 1000:.0f} ms; "
          f"{tokens / seconds:.1f} tokens/s]", file=sys.stderr)
