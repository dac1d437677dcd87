"""The files of a tokenizer as they lie in a folder, read once, checked and kept byte for byte."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from llm_jax import storage
from llm_jax.errors import UserError

JSON, SENTENCEPIECE, RANKS = "tokenizer.json", "tokenizer.model", ".tiktoken"
CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
TEMPLATES = "additional_chat_templates"  # a folder of further ones, NAME.jinja each
_BESIDE = (CONFIG, SPECIALS, ADDED, TEMPLATE, GENERATION)
# The first that is there is the tokenizer, as transformers has it; T5 calls its SentencePiece model spiece.model.
_MAIN = (JSON, SENTENCEPIECE, "spiece.model")
# What a folder without those may have instead: the form from before tokenizer.json, and files that are not read.
OLDER = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "sentencepiece.bpe.model")
# The model's own description says which tokens begin and end a text where the tokenizer's files do not.
MODEL_CONFIG = ("config.json", "huggingface/config.json")
ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
# More ids than this past the others is damage, not a vocabulary.
_MAX_GAP = 1 << 20


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that is cut out of the text before the rest is tokenized.

    Attributes:
      content: what it looks like in a text.
      special: whether it is a control token: nothing that users write means it, and decoding drops it.
      lstrip, rstrip: whether white space before or behind belongs to it.
      single_word: whether it must stand between characters that are no part of words.
    """

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclasses.dataclass(frozen=True)
class Files:
    """A tokenizer's files.

    Attributes:
      where: the main file's path, for messages.
      name: the main file's name, as it is to be saved.
      contents: every file by name, the main one included.
      model_config: the model's `config.json`, if one lies near; empty otherwise.
    """

    where: str
    name: str
    contents: dict[str, bytes]
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def main(self) -> bytes:
        return self.contents[self.name]

    def fields(self, name: str) -> dict[str, Any]:
        """The object in the JSON file `name`; empty if there is no such file."""
        content = self.contents.get(name)
        return {} if content is None else parse_object(content, self.beside(name))

    @property
    def config(self) -> dict[str, Any]:
        return self.fields(CONFIG)

    def beside(self, name: str) -> str:
        return os.path.join(os.path.dirname(self.where), name)

    def paths(self) -> tuple[str, ...]:
        """Where each file would lie, the model's config.json too: what a message about one begins with."""
        return (self.where, *map(self.beside, (*_BESIDE, *MODEL_CONFIG)))

    def flag(self, name: str, default: bool) -> bool:
        """A boolean of tokenizer_config.json; null counts as absent."""
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{self.beside(CONFIG)}: {name} must be true or false, not {value!r:.80}")
        return value

    @property
    def family(self) -> str:
        """The tokenizer's class without "Tokenizer", in lower case ("llama"), else the model's type; "" if unknown."""
        name = self.config.get("tokenizer_class")
        if isinstance(name, str) and name and not name.startswith(("PreTrained", "TokenizersBackend")):
            return re.sub(r"Tokenizer(Fast)?$", "", name).lower()
        kind = self.model_config.get("model_type")
        return kind if isinstance(kind, str) else ""

    def named(self) -> dict[str, str | None]:
        """What the files say of each role in `ROLES`: the token's text, None for "there is none"; else left out."""
        found: dict[str, str | None] = {}
        for name in (SPECIALS, CONFIG):
            fields = self.fields(name)
            for role in ROLES:
                if f"{role}_token" in fields:
                    found[role] = self._text(fields[f"{role}_token"], f"{role}_token", name)
        return found

    def more_special(self) -> list[str]:
        """The further special tokens that tokenizer_config.json or special_tokens_map.json name."""
        found = []
        for name in (CONFIG, SPECIALS):
            fields = self.fields(name)
            for key in ("additional_special_tokens", "extra_special_tokens"):
                value = fields.get(key)
                if isinstance(value, dict):
                    value = list(value.values())
                if value is not None and not isinstance(value, list):
                    raise UserError(f"{self.beside(name)}: {key} must be a list of tokens, not {value!r:.80}")
                found += [text for item in value or () if (text := self._text(item, key, name)) is not None]
        return list(dict.fromkeys(found))

    def added(self, vocab_size: int) -> dict[int, Added]:
        """The tokens of tokenizer_config.json's `added_tokens_decoder`, else of added_tokens.json, by id.

        Args:
          vocab_size: tokens known without them; ids far above are refused.
        """
        named = {text for text in self.named().values() if text is not None} | set(self.more_special())
        listed = self.config.get("added_tokens_decoder")
        name = CONFIG
        if listed is None:
            name = ADDED
            listed = {str(i): {"content": text, "special": text in named} for text, i in self.fields(ADDED).items()}
        if not isinstance(listed, dict):
            raise UserError(f"{self.beside(name)}: added_tokens_decoder must map ids to tokens, not {listed!r:.80}")
        found = {}
        for key, value in listed.items():
            if not re.fullmatch(r"\d{1,9}", key) or int(key) >= vocab_size + _MAX_GAP:
                raise UserError(f"{self.beside(name)}: an added token's id is {key!r:.40}; ids are whole numbers from "
                                f"0, and the vocabulary has {vocab_size} tokens")
            text = self._text(value, f"added token {key}", name)
            if not text:
                raise UserError(f"{self.beside(name)}: added token {key} has no content")
            marks = value if isinstance(value, dict) else {}
            found[int(key)] = Added(text, bool(marks.get("special", False)) or text in named,
                                    *(bool(marks.get(mark, False)) for mark in ("lstrip", "rstrip", "single_word")))
        return found

    def end_ids(self, eos_id: int | None, vocab_size: int) -> tuple[int, ...]:
        """`eos_token_id` of generation_config.json, else of config.json, else the tokenizer's own.

        The first that says anything decides alone, as transformers' `generate` has it: a chat model's list may leave
        out the token that ends a document, and the model then goes on behind it.
        """
        generation = self.fields(GENERATION)
        # Files that were derived from a model's defaults may name tokens that this vocabulary does not have.
        for fields, name, derived in ((generation, GENERATION, generation.get("_from_model_config") is True),
                                      (self.model_config, "config.json", True)):
            ids = listed_ids(fields.get("eos_token_id"))
            if derived:
                ids = [i for i in ids if not isinstance(i, int) or 0 <= i < vocab_size]
            for i in ids:
                if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
                    raise UserError(f"{self.beside(name)}: eos_token_id must hold ids between 0 and {vocab_size - 1}, "
                                    f"not {i!r:.40}")
            if ids:
                return tuple(dict.fromkeys(ids))
        return () if eos_id is None else (eos_id,)

    def config_id(self, role: str, vocab_size: int) -> int | None:
        """The id that config.json gives a role, if it is one of the vocabulary; the first of several."""
        value = self.model_config.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            return None
        return value

    def _text(self, value: Any, what: str, name: str) -> str | None:
        """A token given as its text or as an object with `content`."""
        if isinstance(value, dict):
            value = value.get("content", "")
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.beside(name)}: {what} must be a token's text, not {value!r:.80}")
        return value


def read(path: str | os.PathLike) -> Files:
    """Reads the tokenizer in a folder (local or a bucket), or the one in a given file with what lies beside it.

    Raises:
      UserError: there is none, several rank files and nothing else, or one in a form that is not read.
    """
    try:
        location = storage.as_path(path)
        folder, chosen = (location, _main_of(location)) if location.is_dir() else (location.parent, location)
        older = [name for name in OLDER if chosen is None and (folder / name).exists()]
        contents: dict[str, bytes] = {}
        if chosen is not None:
            content = chosen.read_bytes()
            contents[_saved_name(chosen.name, content)] = content
        elif not older:
            raise FileNotFoundError(f"none of {', '.join(_MAIN)} or *{RANKS} is there")
        name = next(iter(contents), JSON)
        for beside in (*older, *_beside_in(folder)):
            contents[beside] = (folder / beside).read_bytes()
        model_config = next((parse_object((folder / n).read_bytes(), str(folder / n)) for n in MODEL_CONFIG
                             if (folder / n).exists()), {})
    except OSError as error:
        raise UserError(f"no tokenizer at {path}: {error.strerror or error}; experiments/prepare.py writes "
                        f"{SENTENCEPIECE}") from error
    files = Files(str(folder / older[0] if older else chosen), name, contents, model_config)
    return _modern(files) if older else files


def write(directory: str | os.PathLike, contents: dict[str, bytes]) -> None:
    """Writes a tokenizer's files into a folder, each whole or not at all; those of another tokenizer there go first."""
    target = storage.as_path(directory)
    for name in list(names_in(target)) if target.exists() else ():
        if name not in contents:
            (target / name).unlink()
    for name, content in contents.items():
        storage.write_atomically(target / name, content)


def present(directory: str | os.PathLike) -> bool:
    """Whether a folder holds a tokenizer, be it one that is not read."""
    folder = storage.as_path(directory)
    return _main_of(folder) is not None or any((folder / name).exists() for name in OLDER)


def names_in(directory: Any) -> Iterator[str]:
    """The names of a tokenizer's files that lie in `directory`, a path object."""
    ranks = [path.name for path in directory.glob(f"*{RANKS}")]
    yield from (name for name in (*_MAIN, *ranks, *OLDER) if (directory / name).exists())
    yield from _beside_in(directory)


def listed_ids(value: Any) -> list[Any]:
    """Token ids as a JSON file has them (none, one, or a list) in a list, unchecked."""
    return [] if value is None else value if isinstance(value, list) else [value]


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises:
      UserError: it is none.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON, or was cut short: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value


def holds_ranks(content: bytes) -> bool:
    """Whether a file is lines of a base64 token and its rank, whatever it is called (Llama 3: tokenizer.model)."""
    match = re.match(rb"([A-Za-z0-9+/]+={0,2}) \d+\r?\n", content[:4096])
    if match is None:
        return False
    try:
        return bool(base64.b64decode(match[1], validate=True))
    except ValueError:
        return False


def _beside_in(directory: Any) -> Iterator[str]:
    yield from (name for name in _BESIDE if (directory / name).exists())
    if (directory / TEMPLATES).is_dir():
        yield from (f"{TEMPLATES}/{name}" for name in sorted(p.name for p in (directory / TEMPLATES).glob("*.jinja")))


def _modern(files: Files) -> Files:
    """The same tokenizer with the tokenizer.json that stands for its older form."""
    from llm_jax.data.tokenizers import older_form  # which takes this module's parts

    made = older_form.tokenizer_json(files)
    kept = {name: content for name, content in files.contents.items() if name not in OLDER}
    return dataclasses.replace(files, contents={JSON: made} | kept)


def _main_of(directory: Any) -> Any:
    found = next((directory / name for name in _MAIN if (directory / name).exists()), None)
    if found is None:
        ranks = sorted(directory.glob(f"*{RANKS}"), key=str)
        if len(ranks) > 1:
            raise UserError(f"{directory} holds several rank files ({', '.join(p.name for p in ranks)}); name the one")
        found = ranks[0] if ranks else None
    return found


def _saved_name(name: str, content: bytes) -> str:
    """The name under which a main file is found again; a file given by its path may have had any."""
    if content[:64].lstrip()[:1] == b"{" and name != SENTENCEPIECE:
        return JSON
    # The name of a rank file says which vocabulary it is.
    return name if name in _MAIN or name.endswith(RANKS) else SENTENCEPIECE
