"""Chat templates in the manner of known models, each with what a conversation must look like, written out by hand."""

from __future__ import annotations

MESSAGES = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "你好 <b>\"x\"</b>"},
            {"role": "assistant", "content": "Hi\n"}, {"role": "user", "content": "Bye"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "查 <&> it's"}}]

LLAMA3 = """{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role: ' + message['role']) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}
"""
LLAMA3_TEXT = ("<|begin|><|start|>system<|stop|>\n\nBe brief.<|eot|><|start|>user<|stop|>\n\n你好 <b>\"x\"</b><|eot|>"
               "<|start|>assistant<|stop|>\n\nHi<|eot|><|start|>user<|stop|>\n\nBye<|eot|><|start|>assistant<|stop|>\n\n")

CHATML = """{% if tools %}
<|im_start|>tools
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
<|im_end|>
{% endif %}
{% set ns = namespace(last=-1) %}
{% for message in messages %}
    {% if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
    {% if loop.index0 > 10 %}{% break %}{% endif %}
<|im_start|>{{ message.role }}
    {% if message.role == "assistant" %}
{% generation %}{{ message.content.strip() }}{% endgeneration %}<|im_end|>
    {% else %}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
{% if enable_thinking is defined and not enable_thinking %}
<think></think>{{ ns.last }}
{%- endif %}
"""
CHATML_TEXT = ("<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\n你好 <b>\"x\"</b><|im_end|>\n"
               "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
CHATML_TOOLS = ('<|im_start|>tools\n{"type": "function", "function": {"name": "f", "description": "查 <&> it\'s"}}\n'
                "<|im_end|>\n")

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{% set first = messages[0]['content'] | trim + '\\n\\n' %}\
{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}\
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA_TEXT = ("<|begin|><start_of_turn>user\nBe brief.\n\n你好 <b>\"x\"</b><end_of_turn>\n<start_of_turn>model\nHi"
              "<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n")

ALL = {"llama3": (LLAMA3, LLAMA3_TEXT), "chatml": (CHATML, CHATML_TEXT), "gemma": (GEMMA, GEMMA_TEXT)}
