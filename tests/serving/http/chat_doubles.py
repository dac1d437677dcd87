"""A model to talk with that is none: real chat templates over a double of the engine, and answers written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.tokenizers import folder
from llm_jax.inference.request import Delta, SamplingParams, Usage
from llm_jax.inference.text import TextStream
from tests.serving.doubles import CharacterTokenizer, FakeService

CONTROL = ("<|im_start|>", "<|im_end|>", "<|bos|>")
_PRIVATE = 0xE000  # code points that stand for control tokens

# As Qwen 2.5's, but shorter.
HERMES = """{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}For each call: <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}

{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""
MISTRAL = """{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}{% if message.role == "user" %}[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}{% for call in message.tool_calls %}{% if call.id | length != 9 %}
{{- raise_exception("ids have nine characters") }}{% endif %}{% endfor %}[TOOL_CALLS]…
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- else %}{{ message.content }}{% endif %}{% endfor %}"""
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


class ChatTokenizer(CharacterTokenizer):
    """A token for each code point, and one for each control token, which decoding drops."""

    def __init__(self, template: str | None, control: Sequence[str]) -> None:
        self.files = folder.Files("/secret/place/tokenizer.json", "tokenizer.json", {"tokenizer.json": b"{}"} | (
            {} if template is None else {folder.TEMPLATE: template.encode()}))
        self._control = {_PRIVATE + i + 3: text for i, text in enumerate(control)}
        self.special_ids = frozenset((1, 2, *self._control))

    chat_template = Tokenizer.chat_template
    render_chat = Tokenizer.render_chat
    encode_chat = Tokenizer.encode_chat

    def _special_texts(self) -> dict[str, str]:
        return {"bos_token": "<|bos|>"}

    def encode(self, text: str, special: bool = False) -> list[int]:
        for i, marker in self._control.items() if special else ():
            text = text.replace(marker, chr(i - 3))
        return super().encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.special_ids else super().token_bytes(token_id)

    def spelled(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return "".join(self._control.get(i) or super(ChatTokenizer, self).decode([i]) for i in ids)

    decode = Tokenizer.decode
    _leading = staticmethod(Tokenizer._leading)


class ChatService(FakeService):
    """Answers a conversation with what `answer` says, token by token.

    Attributes:
      answer: given the prompt's text, with control tokens, and the number of the sample.
      prompts: the texts of all prompts.
    """

    def __init__(self, answer: str | Callable[[str, int], str] = "你好！ I am here.", template: str | None = HERMES,
                 control: Sequence[str] = CONTROL, **options: float) -> None:
        self.tokenizer = ChatTokenizer(template, control)
        self.answer = answer if callable(answer) else lambda prompt, sample: answer
        self.prompts: list[str] = []
        super().__init__(**options)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [1] * add_bos + self.tokenizer.encode(text)

    def submit_samples(self, prompt_ids: Sequence[int], *rest, **options) -> list[int]:
        self.prompts.append(self.tokenizer.spelled(prompt_ids))
        return super().submit_samples(prompt_ids, *rest, **options)

    def _answer(self, text: str, num_prompt: int, params: SamplingParams) -> Iterator[Delta]:
        stream = TextStream(self.tokenizer, params.stop)
        ids = self.tokenizer.encode(self.answer(self.prompts[-1], params.sample), special=True)
        top = tuple((i, -float(i - 99)) for i in range(100, 100 + params.logprobs))
        for i, token in enumerate(ids):
            if i == params.max_tokens:
                yield Delta(text=stream.flush(), finish_reason="length", usage=Usage(num_prompt, i))
                return
            text = stream.push(token)
            yield Delta(text=text, token_ids=(token,), logprobs=(-0.5,), top_logprobs=(top,) if top else (),
                        finish_reason="stop" if stream.stopped else None,
                        usage=Usage(num_prompt, i + 1, 2) if stream.stopped else None)
            if stream.stopped:
                return
        yield Delta(text=stream.flush(), finish_reason="stop", usage=Usage(num_prompt, len(ids), 2))
