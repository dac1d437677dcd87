"""Constrained output: which tokens may come next if the completion is to belong to a JSON schema, regex or grammar.

llguidance (https://github.com/guidance-ai/llguidance) follows the text byte by byte, with an Earley parser over a lexer
of regular-expression derivatives, and walks the vocabulary's prefix tree to find the tokens that keep it within the
language. Here it is given the bytes of our tokens and the rules of our text: special tokens are no text, a space that
decoding takes away at the beginning is not seen, and every token whose bytes fit is allowed, not just one spelling.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import llguidance
import numpy as np

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint, InvalidRequest

MAX_COMPILED = 32  # grammars kept, least recently used out first
COMPILE_SECONDS = 2  # of processor time
COMPILE_BYTES = 4 << 30  # of address space
# A lexer state takes 1–2 kB, and those of a grammar are shared by all who use it.
MAX_LEXER_STATES = 25_000
# Earley items, per row and per mask (about 20 a microsecond). The stock 2,000 is too few for 1,000 optional properties.
_ITEMS_PER_ROW, _ITEMS_PER_MASK = 10_000, 200_000
_QUICK = 0.1  # seconds; a grammar that compiles faster may be compiled again between two steps
_MAX_REASON, _MAX_LINE = 600, 120  # characters of llguidance's messages, which quote what they are about
_NAMES = {"json_schema": "the JSON schema", "regex": "the regular expression", "grammar": "the grammar"}

# Some schemas take llguidance hours (an `allOf` of many patterns, `multipleOf` of a large prime): its limits do not
# reach everything that it computes, and a thread of this process could not be stopped. So a grammar that has not been
# seen before is first compiled, and followed for some bytes, in a process that may be killed.
_TRIAL = """
import json, random, resource, sys
size, seconds = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
except (OSError, ValueError):
    pass  # macOS has no such limit
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
import llguidance

class Bytes:
    is_tokenizer_wrapper, bos_token_id, special_token_ids = True, None, ()
    tokens, eos_token_id = [bytes([i]) for i in range(255)] + [b"\\xff<\\0>", b""], 256

matcher = llguidance.LLMatcher(llguidance.LLTokenizer(Bytes(), slices=[]), sys.stdin.buffer.read().decode(),
                               log_level=0, limits=llguidance.LLParserLimits(**json.loads(sys.argv[3])))
random.seed(0)
for _ in range(100):
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    allowed = [i for i in range(255) if mask >> i & 1]
    if not allowed or matcher.is_stopped():
        break
    matcher.consume_token(random.choice(allowed))
"""

# White space between the parts of a JSON text: enough to indent by, and not to go on for ever with.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,128}"
# Without this, where only one text is possible llguidance allows only the tokens that it would spell it with.
_ANY_SPELLING = '%llguidance {"no_forcing": true}'


class ConstraintFailed(UserError):
    """The completion can't go on within its constraint, which is too complex or beyond what the tokens can spell."""


class _Vocabulary:
    """A vocabulary as llguidance reads it (its TokenizerWrapper); the last token stands for the end of the text."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: list[bytes]) -> None:
        # Without a special token, a grammar that names one makes it panic. This one's name can't be written.
        self.tokens = [*tokens, b"\xff<\0>", b""]
        self.eos_token_id = len(tokens) + 1


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A grammar that is ready for use; `matcher` stays at the beginning and is copied."""

    matcher: llguidance.LLMatcher
    seconds: float


class Grammars:
    """The compiled constraints of one model. May be used by several threads at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, max_compiled: int = MAX_COMPILED,
                 max_lexer_states: int = MAX_LEXER_STATES) -> None:
        """Reads the vocabulary, about a second for 100,000 tokens.

        Args:
          tokenizer: the model's.
          vocab_size: of the model, which may be more or less than the tokenizer's; ids that the tokenizer does not have
            are never allowed.
          max_compiled: grammars to keep.
          max_lexer_states: of one grammar, a bound on its memory.
        """
        known = min(vocab_size, tokenizer.vocab_size)
        ends = [i for i in tokenizer.end_ids if i < vocab_size]
        silent = tokenizer.special_ids.union(ends)
        # A first byte of 0xff would mean a special token to llguidance; no text has that byte.
        spelt = [b"" if i in silent or (b := tokenizer.token_bytes(i))[:1] == b"\xff" else b for i in range(known)]
        spelt += [b""] * (vocab_size - known)
        self.text_words = _words(np.array([bool(b) for b in spelt], bool))
        self.end_ids = frozenset(ends)
        self.end_words = _words(np.isin(np.arange(vocab_size), ends))
        self.vocab_size = vocab_size
        self.first = _First(spelt, tokenizer.stripped_spaces)
        self._tokenizer = llguidance.LLTokenizer(_Vocabulary(spelt + self.first.more))
        self._limits = {"max_items_in_row": _ITEMS_PER_ROW, "step_max_items": _ITEMS_PER_MASK,
                        "max_lexer_states": max_lexer_states, "precompute_large_lexemes": False,
                        "verbose_errors": False}
        self._max_compiled = max_compiled
        self._compiled: collections.OrderedDict[Constraint, _Compiled | str] = collections.OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """Begins a completion under `constraint`.

        The first time a constraint is seen it is compiled, which takes a tenth of a second and at most a few: not for
        the thread that runs the engine's steps.

        Raises:
          InvalidRequest: it is not a JSON schema, regular expression or grammar that llguidance can follow, takes too
            long to compile, or no text belongs to it.
        """
        with self._lock:
            found = self._compiled.get(constraint)
            if found is not None:
                self._compiled.move_to_end(constraint)
        if found is None:
            try:
                grammar = _grammar(constraint)
                _try(constraint, grammar, self._limits)
                found = self._compile(constraint, grammar)
            except InvalidRequest as error:
                found = str(error)
            self._keep(constraint, found)
        if isinstance(found, str):
            raise InvalidRequest(found, constraint.kind)
        return Matcher(self, constraint, found)

    def again(self, constraint: Constraint, full: _Compiled,
              tokens: list[int]) -> tuple[_Compiled, llguidance.LLMatcher] | None:
        """The grammar compiled anew, and a matcher of it that has taken `tokens`; None if that takes long or fails.

        All matchers of a compiled grammar add states to one lexer, which forgets none. When it is full none of them
        can go on, though each by itself may need but few.

        Args:
          constraint: the grammar.
          full: what it was compiled to, not to be used any more.
          tokens: as llguidance took them.
        """
        if full.seconds > _QUICK:
            with self._lock:
                if self._compiled.get(constraint) is full:
                    del self._compiled[constraint]
            return None
        with self._lock:
            made = self._compiled.get(constraint)
        if made is full or not isinstance(made, _Compiled):
            made = self._compile(constraint, _grammar(constraint))
            self._keep(constraint, made)
        matcher = made.matcher.deep_copy()
        return (made, matcher) if matcher.try_consume_tokens(tokens) == len(tokens) else None

    def _keep(self, constraint: Constraint, made: _Compiled | str) -> None:
        with self._lock:
            self._compiled[constraint] = made
            while len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)

    def _compile(self, constraint: Constraint, grammar: str) -> _Compiled:
        began = time.monotonic()
        limits = llguidance.LLParserLimits(**self._limits)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        made = _Compiled(matcher, time.monotonic() - began)
        if matcher.is_error():
            raise InvalidRequest(f"{_NAMES[constraint.kind]} can't be used: {_reason(matcher.get_error())}")
        try:
            Matcher(self, constraint, made, renew=False).mask()
        except ConstraintFailed as error:
            raise InvalidRequest(f"{_NAMES[constraint.kind]} can't be used: no completion satisfies it, or it is too "
                                 f"complex ({error})") from error
        return made


class Matcher:
    """One completion's place in its language. For one thread at a time."""

    def __init__(self, grammars: Grammars, constraint: Constraint, compiled: _Compiled, renew: bool = True) -> None:
        """Called by `Grammars`; `renew`: whether a full lexer may be replaced."""
        self._grammars = grammars
        self._constraint = constraint
        self._compiled = compiled
        self._renew = renew
        self._matcher = compiled.matcher.deep_copy()
        self._tokens: list[int] = []  # as llguidance took them
        self._first = grammars.first if grammars.first.strips else None
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow it; an end token need not be drawn any more."""
        return self._finished

    def mask(self) -> np.ndarray:
        """The tokens that may come next: uint32 [ceil(vocab_size / 32)], bit v % 32 of word v // 32 for token v.

        Those are the tokens after which the text can still be completed, and the end tokens when it is complete as it
        is. When it is finished only they are set, if there are any; otherwise at least one bit is.

        Raises:
          ConstraintFailed: no token may come next.
        """
        grammars = self._grammars
        if self._finished:
            return grammars.end_words.copy()
        words = np.frombuffer(self._asked(lambda: self._matcher.compute_bitmask()), "<u4")
        complete = self._matcher.is_accepting()
        mask = words[:len(grammars.text_words)] & grammars.text_words
        if self._first is not None:
            mask = self._first.mask(words, mask, complete)
        if not mask.any():
            if not complete:
                raise ConstraintFailed("no token of the vocabulary can continue the completion as its constraint wants")
            self._finished = True
        return mask | grammars.end_words if complete else mask

    def accept(self, token_id: int) -> None:
        """Takes the token that was drawn.

        Raises:
          ConstraintFailed: the last mask did not allow it, or the constraint became too complex.
        """
        if token_id in self._grammars.end_ids:
            if not (self._finished or self._matcher.is_accepting()):
                raise ConstraintFailed(f"end token {token_id} where the completion is not complete")
            self._finished = True
            return
        if self._finished or not 0 <= token_id < self._grammars.vocab_size:
            raise ConstraintFailed(f"token {token_id} is not one that may come next")
        taken: int | None = token_id
        if self._first is not None:
            taken, self._first = self._first.taken(token_id), None
        if taken is None:
            return
        if self._asked(lambda: self._matcher.try_consume_tokens([taken])) != 1:
            raise ConstraintFailed(f"token {token_id} is not one that may come next")
        self._tokens.append(taken)
        self._finished = self._matcher.is_stopped()

    def _asked(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; if that fails for want of lexer states, with a lexer that has only our own."""
        result = call()
        if self._renew and self._matcher.is_error() and "too many states" in self._matcher.get_error():
            again = self._grammars.again(self._constraint, self._compiled, self._tokens)
            if again is not None:
                self._compiled, self._matcher = again
                result = call()
        if self._matcher.is_error():
            raise ConstraintFailed("the completion can't follow its constraint any further: "
                                   + _reason(self._matcher.get_error()))
        return result


class _First:
    """The first token, where decoding takes spaces away: the constraint sees what is left of it.

    A token that begins with such spaces is followed as the token that is spelt as its rest. Where the vocabulary has
    none, one is added behind it, for this use alone.
    """

    def __init__(self, spelt: list[bytes], strips: int) -> None:
        """Args: the bytes of every token; how many spaces are taken away, at most."""
        self.strips = strips
        self.more: list[bytes] = []
        ids = {content: i for i, content in reversed(list(enumerate(spelt)))}
        spaced = {i: content for i, content in enumerate(spelt) if strips and content[:1] == b" "}
        rest_of: dict[int, int] = {}
        for i, content in spaced.items():
            rest = content[min(strips, len(content) - len(content.lstrip(b" "))):]
            if rest and rest not in ids:
                ids[rest] = len(spelt) + len(self.more)
                self.more.append(rest)
            if rest:
                rest_of[i] = ids[rest]
        self._rest_of = rest_of
        # A token of which nothing is left changes no text. One may come, and only if no more spaces are taken away
        # behind it, or they could go on for ever.
        self._blank = frozenset(i for i, content in spaced.items() if len(content) == strips)
        self._is_plain = _words(np.array([i not in spaced for i in range(len(spelt))], bool))
        self._spaced = np.array(list(rest_of), np.int64)
        self._rests = np.array(list(rest_of.values()), np.int64)

    def mask(self, words: np.ndarray, plain: np.ndarray, complete: bool) -> np.ndarray:
        """The mask of the first token.

        Args:
          words: llguidance's mask.
          plain: the mask if no space were taken away.
          complete: whether the empty text belongs to the language.
        """
        allowed = np.zeros(32 * len(plain), bool)
        allowed[self._spaced] = words[self._rests >> 5] >> (self._rests & 31).astype(np.uint32) & 1
        allowed[list(self._blank)] = complete or bool(plain.any())
        return _words(allowed) | plain & self._is_plain

    def taken(self, token_id: int) -> int | None:
        """The token that llguidance is given for `token_id`; None if it changes no text."""
        return None if token_id in self._blank else self._rest_of.get(token_id, token_id)


def _words(bits: np.ndarray) -> np.ndarray:
    """bool [n] as uint32 [ceil(n / 32)]."""
    padded = np.zeros(-(-len(bits) // 32) * 32, bool)
    padded[:len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<u4")


def _grammar(constraint: Constraint) -> str:
    """The constraint as llguidance reads it.

    Raises:
      InvalidRequest: it is not JSON where it must be.
    """
    if constraint.kind == "grammar":
        # Behind it, so that line numbers in messages are right.
        return json.dumps({"grammars": [{"lark_grammar": f"{constraint.text}\n{_ANY_SPELLING}"}]})
    if constraint.kind == "regex":
        try:
            escaped = llguidance.regex_to_lark(constraint.text, "d")  # \d is 0-9, as nearly everyone means it
        except ValueError as error:
            raise InvalidRequest(f"the regular expression can't be used: {_reason(str(error))}") from error
        return json.dumps({"grammars": [{"lark_grammar": f"start: /{escaped}/\n{_ANY_SPELLING}"}]})
    try:
        schema = json.loads(constraint.text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the JSON schema is not JSON: {_reason(str(error))}") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequest(f"the JSON schema must be an object, not {json.dumps(schema):.80}")
    schema["x-guidance"] = {"whitespace_pattern": _WHITE_SPACE}
    return json.dumps({"grammars": [{"lark_grammar": f"start: @schema\n{_ANY_SPELLING}"},
                                    {"name": "schema", "json_schema": schema}]})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _try(constraint: Constraint, grammar: str, limits: dict[str, int]) -> None:
    """Compiles a grammar in a process of its own.

    Raises:
      InvalidRequest: it takes too much time or memory, or ends the process.
    """
    command = [sys.executable, "-P", "-c", _TRIAL, str(COMPILE_BYTES), str(COMPILE_SECONDS), json.dumps(limits)]
    try:
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=20 * COMPILE_SECONDS,
                              start_new_session=True)  # an interrupt from the keyboard is not for it
    except subprocess.TimeoutExpired:
        code = -signal.SIGXCPU
    else:
        code = done.returncode
    if code > 0 and b"MemoryError" not in done.stderr:
        raise RuntimeError(f"the trial of a grammar exited with {code}: {done.stderr.decode(errors='replace')[-500:]}")
    if code:
        raise InvalidRequest(f"{_NAMES[constraint.kind]} is too complex: compiling it takes more than "
                             f"{COMPILE_SECONDS} s or {COMPILE_BYTES >> 30} GiB")


def _reason(message: str) -> str:
    """llguidance's message without what is for its developers."""
    for mark in ("\n<", "<backtrace>"):
        message = message.split(mark)[0]
    lines = [line for line in message.strip().split("\n") if _ANY_SPELLING not in line]
    message = "\n".join(line if len(line) <= _MAX_LINE else line[:_MAX_LINE] + " …" for line in lines)
    return message if len(message) <= _MAX_REASON else message[:_MAX_REASON] + " …"
