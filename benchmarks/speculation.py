"""Speculative decoding on a really trained pair: acceptance, tokens a step, speed, and whether the tokens are the same.

    python -m benchmarks.speculation                            # trains a pair on Python's standard library: minutes
    python -m benchmarks.speculation --corpus=~/books --directory=runs/books
    python -m benchmarks.speculation --run_dir=runs/big --draft_run_dir=runs/small --data_dir=data/quickstart

Three services over the target's weights, plain, with prompt look-up and with the draft model, continue the same
prompts of the validation split, greedily and at a temperature, alone, a few at once, and with the batch full, where
nothing is proposed any more. Tokens are identical by design (a token is drawn at every position with the noise that it
would have had anyway): each variant's are compared with the plain ones, and one that differs by more than a near-tie
of 1e-4 ends the benchmark with status 1.

The workload "repeating" is for look-up: prompts that say one thing four times. It shows what look-up does where text
repeats itself, and nothing of what edits or summaries of a large model would: a model trained in minutes makes none.

Acceptance is measured with as many proposals as there may be at every step ("forced") and with the policy that the
engine measured for this machine ("own"). Speed is decoding alone: tokens after every row's first, over the time from
then on. Medians over rounds, in which the variants take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from benchmarks.trained_pair import Pair, held_out, make
from llm_jax import compile_cache, runs
from llm_jax.inference import sampling
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import Completion
from llm_jax.inference.request import Delta, SamplingParams
from llm_jax.inference.service import Service
from llm_jax.inference.speculation import Policy

VARIANTS = ("plain", "lookup", "draft")
NEAR_TIE = 1e-4


@dataclasses.dataclass(frozen=True)
class Served:
    """What became of some prompts that came together.

    Attributes:
      completions: one a prompt.
      tokens, seconds: drawn after every row's first token, and the time from then on.
      steps: of the engine, prompts included.
      proposed, accepted, checks: tokens proposed, those that were drawn, and (row, step) pairs that had any.
    """

    completions: tuple[Completion, ...]
    tokens: int
    seconds: float
    steps: int
    proposed: int
    accepted: int
    checks: int


def serve(service: Service, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Served:
    """Submits prompts together and waits for all."""
    deltas: list[list[tuple[float, Delta]]] = [[] for _ in prompts]
    finished = threading.Semaphore(0)
    before, checks = service.stats(), service.statistics.proposals.steps

    def listener(into: list[tuple[float, Delta]]) -> Callable[[Delta], None]:
        def listen(delta: Delta) -> None:
            into.append((time.perf_counter(), delta))
            if delta.finish_reason is not None:
                finished.release()
        return listen

    for prompt, each, into in zip(prompts, params, deltas, strict=True):
        service.submit(prompt, each, listener(into))
    for _ in prompts:
        finished.acquire()
    after = service.stats()
    began = max(each[0][0] for each in deltas)
    late = [(at, len(d.token_ids)) for each in deltas for at, d in each if at > began]
    completions = tuple(Completion.of([d for _, d in each]) for each in deltas)
    for one in completions:
        if one.error:
            raise SystemExit(f"a request failed: {one.error}")
    return Served(completions, sum(n for _, n in late), max(at for at, _ in late) - began,
                  *(after[name] - before[name] for name in ("steps", "proposed", "accepted")),
                  service.statistics.proposals.steps - checks)


def difference(plain: Completion, other: Completion, params: SamplingParams, num_prompt: int) -> float | None:
    """How clearly two completions of one prompt differ; None if they don't.

    At the first token that differs, both variants saw the same text: how far apart the two tokens were in what the draw
    takes the greatest of, logits over temperature plus noise, is told from the log-probabilities that each gave its own
    choice. Rounding explains a near-tie, and nothing else explains more. Infinite if one goes on where the other ends.
    """
    a, b = plain.token_ids, other.token_ids
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return None if len(a) == len(b) else float("inf")
    gap = plain.logprobs[at] - other.logprobs[at]
    if params.temperature:
        key = sampling.row_key(params.seed or 0, params.sample, num_prompt + at)
        noise = sampling.gumbel_of(jnp.array([key], jnp.uint32), jnp.array([[a[at], b[at]]], jnp.int32))
        gap = gap / params.temperature + float(noise[0, 0]) - float(noise[0, 1])
    return abs(gap)


def services(pair: Pair, max_proposed: int, max_context: int) -> dict[str, Service]:
    """The three variants, compiled."""
    target, draft = runs.load(pair.target), runs.load(pair.draft)
    layout = EngineConfig(max_context=max_context, prefix_cache=False, num_pages=40 * -(-max_context // 16))
    made = {}
    for name in VARIANTS:
        options = layout if name == "plain" else dataclasses.replace(layout, max_proposed=max_proposed)
        engine = Engine(target.config, target.params, options,
                        draft=(draft.config, draft.params) if name == "draft" else None)
        seconds = engine.compile()
        print(f"{name}: compiled in {seconds:.1f} s, {engine.policy}", file=sys.stderr, flush=True)
        made[name] = Service(engine, target.tokenizer, max_queue=1000)
    return made


def repeated(pieces: Sequence[Sequence[int]], length: int, period: int) -> list[list[int]]:
    """Prompts of about `length` tokens in which the first `period` tokens after the BOS come again and again."""
    return [[*p[:1], *(list(p[1:1 + period]) * (length // period))] for p in pieces]


def measure(made: dict[str, Service], own: dict[str, Policy], prompts: Sequence[Sequence[int]],
            params: Sequence[SamplingParams], rows: int, rounds: int) -> list[dict]:
    """A line for each variant and policy: the prompts in groups of `rows`, round by round."""
    groups = [range(i, min(i + rows, len(prompts))) for i in range(0, len(prompts), rows)]
    cases = [("plain", "own"), *((name, policy) for name in VARIANTS[1:] for policy in ("forced", "own"))]
    found: dict[tuple[str, str], list[list[Served]]] = {case: [] for case in cases}
    for number in range(rounds):
        for name, policy in cases if number % 2 else reversed(cases):
            most = own[name].most
            made[name].engine.policy = own[name] if policy == "own" else Policy(  # always all of them
                most, prior=1.0, weight=1e-6)
            found[name, policy].append([serve(made[name], [prompts[i] for i in group], [params[i] for i in group])
                                        for group in groups])
    rates = {case: statistics.median(sum(s.tokens for s in each) / sum(s.seconds for s in each) for each in times)
             for case, times in found.items()}
    lines = []
    for (name, policy), times in found.items():
        gaps = [difference(a, b, params[i], len(prompts[i])) for each in times
                for plain, other, group in zip(found["plain", "own"][0], each, groups, strict=True)
                for a, b, i in zip(plain.completions, other.completions, group, strict=True)]
        ties = [gap for gap in gaps if gap is not None]
        total = {field: sum(getattr(s, field) for s in times[-1])
                 for field in ("steps", "proposed", "accepted", "checks")}
        lines.append({
            "variant": name, "policy": policy, **total,
            "acceptance": round(total["accepted"] / total["proposed"], 3) if total["proposed"] else None,
            "tokens_per_check": round(1 + total["accepted"] / total["checks"], 2) if total["checks"] else None,
            "tokens_per_second": round(rates[name, policy], 1),
            "ratio_to_plain": round(rates[name, policy] / rates["plain", "own"], 3),
            "compared": len(gaps), "differing": len(ties), "widest_gap": max(ties, default=0.0)})
    return lines


def show(line: dict) -> None:
    """One row of the table."""
    said = {key: "-" if value is None else value for key, value in line.items()}
    print(f"{line['workload']:10}{line['temperature']:5.1f}{line['rows']:5d} {line['variant']:8}{line['policy']:8}"
          f"{said['acceptance']:>9}{said['tokens_per_check']:>13}{line['checks']:7d}{line['steps']:7d}"
          f"{line['tokens_per_second']:10,.0f}{line['ratio_to_plain']:7.2f}  "
          f"{line['compared'] - line['differing']} of {line['compared']}"
          + (f", gap {line['widest_gap']:.1e}" if line["differing"] else ""), flush=True)


def main() -> int:
    """Measures and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="runs/speculation", help="where a pair is trained, or was")
    parser.add_argument("--corpus", default="python-stdlib", help="what it is trained on: a file or folder of text")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--run_dir", help="a trained target to take instead")
    parser.add_argument("--draft_run_dir", help="its draft")
    parser.add_argument("--data_dir", help="their prepared data")
    parser.add_argument("--prompts", type=int, default=32, help="in all; each case takes them in groups of its rows")
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--proposed", type=int, default=4, help="most tokens proposed at once")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--rows", default="1,8,32", help="rows at once, of each case")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    given = (args.run_dir, args.draft_run_dir, args.data_dir)
    if any(given) != all(given):
        parser.error("--run_dir, --draft_run_dir and --data_dir go together")
    compile_cache.enable_compile_cache()
    pair = Pair(*map(pathlib.Path, (args.data_dir, args.run_dir, args.draft_run_dir))) if all(given) else make(
        pathlib.Path(args.directory).expanduser(), args.corpus, args.steps)
    losses = {name: runs.load(run_dir).manifest["metrics"]["end"]["loss"]
              for name, run_dir in (("target", pair.target), ("draft", pair.draft))}
    sizes = {name: runs.load(run_dir).config.num_params() for name, run_dir in (("target", pair.target),
                                                                               ("draft", pair.draft))}
    plain_prompts = held_out(pair.data_dir, args.prompts, args.length)
    workloads = {"held-out": plain_prompts, "repeating": repeated(plain_prompts, args.length, args.length // 4)}
    made = services(pair, args.proposed, args.length + args.output + 16)
    own = {name: service.engine.policy for name, service in made.items()}
    print(f"target {sizes['target'] / 1e6:.2f} M parameters (validation loss {losses['target']:.3f}), draft "
          f"{sizes['draft'] / 1e6:.2f} M ({losses['draft']:.3f}); {args.prompts} prompts of {args.length} tokens, "
          f"{args.output} tokens from each, at most {args.proposed} proposed")
    print(f"{'workload':10}{'T':>5}{'rows':>5} {'variant':8}{'policy':8}{'accepted':>9}{'tokens/check':>13}"
          f"{'checks':>7}{'steps':>7}{'tokens/s':>10}{'ratio':>7}  identical")
    table: list[dict] = []
    for workload, prompts in workloads.items():
        for temperature in (0.0, args.temperature):
            params = [SamplingParams(max_tokens=args.output, ignore_eos=True, temperature=temperature, seed=i)
                      for i in range(len(prompts))]
            for rows in map(int, args.rows.split(",")):
                # Alone, a quarter of the prompts is enough.
                count = len(prompts) if rows > 1 else max(1, len(prompts) // 4)
                for line in measure(made, own, prompts[:count], params[:count], rows, args.rounds):
                    table.append({"workload": workload, "temperature": temperature, "rows": rows, **line})
                    show(table[-1])
    worst = max(line["widest_gap"] for line in table)
    for service in made.values():
        service.close()
    print(json.dumps({"parameters": sizes, "validation_loss": {k: round(v, 4) for k, v in losses.items()},
                      "widest_gap": worst, "identical": worst <= NEAR_TIE, "cases": table}))
    return 0 if worst <= NEAR_TIE else 1


if __name__ == "__main__":
    sys.exit(main())
