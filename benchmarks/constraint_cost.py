"""What constrained output costs the host: compiling a constraint, and a mask and an accepted token at every step.

    python -m benchmarks.constraint_cost [--tokenizer FOLDER_OR_FILE] [--tokens 300] [--seed 0]

Follows random completions under a few constraints with a small vocabulary, trained here, and with the one given. No
model runs: tokens are drawn evenly from the mask, which is harder on the parser than a model's choice. Prints a table
and, as its last line, the same as JSON; times are of one thread.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.inference.constraints import Grammars
from llm_jax.inference.request import Constraint

PERSON = {"type": "object", "additionalProperties": False, "required": ["name", "age", "tags"], "properties": {
    "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"enum": ["red", "green", "蓝"]}}, "note": {"type": "string"}}}
CASES = {
    "any JSON": Constraint("json_schema", "{}"),
    "object": Constraint("json_schema", json.dumps(PERSON)),
    "200 properties": Constraint("json_schema", json.dumps({
        "type": "object", "properties": {f"field_{i}": {"type": ["string", "number"]} for i in range(200)}})),
    "choice": Constraint("regex", "(yes|no|perhaps)(, (yes|no|perhaps))*"),
    "date": Constraint("regex", r"\d{4}-(0\d|1[0-2])-([0-2]\d|3[01])( .{1,80})?"),
    "arithmetic": Constraint("grammar", 'start: s\ns: p (("+" | "-") p)*\np: f ("*" f)*\nf: /[0-9]+/ | "(" s ")"'),
}


def measure(grammars: Grammars, constraint: Constraint, tokens: int, seed: int) -> dict[str, float]:
    """Microseconds a token over `tokens` tokens of as many completions as that takes, and what compiling took."""
    began = time.perf_counter()
    grammars.matcher(constraint)
    compiled = time.perf_counter() - began
    rng = np.random.default_rng(seed)
    masks, accepts, matcher = [], [], grammars.matcher(constraint)
    while len(masks) < tokens:
        if matcher.finished:
            matcher = grammars.matcher(constraint)
        began = time.perf_counter()
        mask = matcher.mask()
        masks.append(time.perf_counter() - began)
        drawn = int(rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))))
        began = time.perf_counter()
        matcher.accept(drawn)
        accepts.append(time.perf_counter() - began)
    return {"compile_ms": 1e3 * compiled, "mask_p50_us": 1e6 * float(np.median(masks)),
            "mask_p99_us": 1e6 * float(np.quantile(masks, 0.99)), "mask_mean_us": 1e6 * float(np.mean(masks)),
            "accept_mean_us": 1e6 * float(np.mean(accepts))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", help="a tokenizer's folder or file")
    parser.add_argument("--tokens", type=int, default=300, help="tokens to draw for each constraint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    words = [f"The {a} {b} of page {n}: {{\"{a}\": {n}, \"{b}\": [{n}.5, true]}}\n" for n in range(200)
             for a, b in (("name", "colour"), ("value", "number"), ("date", "price"))]
    tokenizers = [train_tokenizer(words, 1000)]
    if args.tokenizer:
        tokenizers.append(Tokenizer.load(args.tokenizer))
    result: dict[str, dict[str, dict[str, float]]] = {}
    for tokenizer in tokenizers:
        began = time.perf_counter()
        grammars = Grammars(tokenizer, tokenizer.vocab_size)
        print(f"\n{tokenizer.vocab_size} tokens, read in {time.perf_counter() - began:.2f} s")
        print(f"{'constraint':16s}{'compile ms':>12s}{'mask µs: mean':>15s}{'p50':>8s}{'p99':>8s}{'accept µs':>11s}")
        rows = result.setdefault(str(tokenizer.vocab_size), {})
        for name, constraint in CASES.items():
            row = rows[name] = measure(grammars, constraint, args.tokens, args.seed)
            print(f"{name:16s}{row['compile_ms']:12.1f}{row['mask_mean_us']:15.1f}{row['mask_p50_us']:8.1f}"
                  f"{row['mask_p99_us']:8.1f}{row['accept_mean_us']:11.1f}")
    print(json.dumps({"microseconds_by_vocabulary": result}))


if __name__ == "__main__":
    main()
