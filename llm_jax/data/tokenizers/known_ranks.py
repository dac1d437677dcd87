"""What rank files do not say themselves: how text is split before merging, and the special tokens, of known ones.

A file is known by its ids alone: how many there are, and that they are 0, 1, 2 … with a gap only where the vocabulary
has a special token. The number differs for each of these, and any other is refused:

| ranks | vocabulary | of which models | pattern and special tokens as in |
| --- | --- | --- | --- |
| 50,256 | r50k_base | GPT-2, GPT-3 | tiktoken's `openai_public` |
| 50,280 | p50k_base | Codex, text-davinci-002 and -003 | the same |
| 100,256 | cl100k_base | GPT-3.5, GPT-4 | the same |
| 199,998 | o200k_base | GPT-4o; not gpt-oss, which has more special tokens | the same |
| 128,000 | Llama 3 | Llama 3, 3.1, 3.2 (text), 3.3 | Meta's `tokenizer.py`, token names of 3.1 |
| 151,643 | Qwen | Qwen 1 (later ones: other special tokens, in a tokenizer.json) | `tokenization_qwen.py` |
| 151,329 | GLM-4 | GLM-4-9B and its chat model | `tokenization_chatglm.py` |

A vocabulary that is none of them and has as many ranks would be taken for one: for that, `pat_str` and
`added_tokens_decoder` in tokenizer_config.json go over what is known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

# Runs of letters, digits by one or three, punctuation, white space; each family's own pattern, as it published it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
          r"\s*[\r\n]|\s+(?!\S)|\s")
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
         rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclasses.dataclass(frozen=True)
class Known:
    """A published vocabulary.

    Attributes:
      pattern: the regular expression that splits a text.
      special: special tokens by id.
      bos, eos, pad: which of them.
      prefix: what a prompt begins with.
      composed: whether text is brought to Unicode's composed form (NFC) first.
    """

    pattern: str
    special: dict[int, str]
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    prefix: tuple[str, ...] = ()
    composed: bool = False


def _numbered(first: int, names: list[str]) -> dict[int, str]:
    return dict(enumerate(names, first))


def _llama3() -> dict[int, str]:
    # 3.0 calls those of 3.1 that it does not use reserved; the ids are the same.
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id",
             8: "eom_id", 9: "eot_id", 10: "python_tag"}
    free = iter(range(256))
    return {128000 + i: f"<|{named.get(i) or f'reserved_special_token_{next(free)}'}|>" for i in range(256)}


_GLM4 = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
         "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
_FIM = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
_END = "<|endoftext|>"

# By how many ranks the file holds.
_KNOWN: dict[int, Known] = {
    50256: Known(GPT2, {50256: _END}, eos=_END),  # r50k_base, GPT-2
    50280: Known(GPT2, {50256: _END}, eos=_END),  # p50k_base
    100256: Known(CL100K, _numbered(100257, _FIM) | {100276: "<|endofprompt|>"}, eos=_END),  # cl100k_base
    199998: Known(O200K, {199999: _END, 200018: "<|endofprompt|>"}, eos=_END),  # o200k_base
    128000: Known(LLAMA3, _llama3(), "<|begin_of_text|>", "<|end_of_text|>", None, ("<|begin_of_text|>",)),  # Llama 3
    151643: Known(QWEN, _numbered(151643, [_END, "<|im_start|>", "<|im_end|>"]
                                  + [f"<|extra_{i}|>" for i in range(205)]), eos=_END, pad=_END, composed=True),  # Qwen
    151329: Known(LLAMA3, _numbered(151329, _GLM4), eos=_END, pad=_END, prefix=("[gMASK]", "<sop>")),  # GLM-4
}


def find(ranks: Collection[int]) -> Known | None:
    """The published vocabulary with those ranks (each is there once), in any order; None if it is none of them."""
    known = _KNOWN.get(len(ranks))
    if known is None:
        return None
    ids, expected = set(ranks), 0
    for _ in range(len(ranks)):
        expected += expected in known.special
        if expected not in ids:
            return None
        expected += 1
    return known
