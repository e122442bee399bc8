"""Chat templates in the manner of models', for tests: written of the tiny tokenizer's tokens."""

from vlmtrim.export.weights.tiny import CHAT_TEMPLATE, VIDEO_TEMPLATE

LLAVA = CHAT_TEMPLATE
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<s>system\nYou are a helpful "
    "assistant.</s>\n{% endif %}<s>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<pad><image><pad>{% else %}{{ content['text'] }}{% endif %}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {% for content in message"
    "['content'] if content.type == 'image' %}<image>\n{% endfor %}{% for content in message['content'] if content.type "  # noqa: E501
    "== 'text' %}{{ content.text }}{% endfor %} [/INST]{% elif message.role == 'assistant' %}{% for content in message"
    "['content'] %} {{ content.text }}{% endfor %}</s>{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"  # noqa: E501
)
# Of Llama-3.2-Vision: a date and a system text, which conversations with pictures do not have.
MLLAMA = (
    "{{- bos_token }}{%- set found = namespace(pictures=false) %}{%- for message in messages %}{%- for content in "
    "message.content %}{%- if content.type == 'image' %}{%- set found.pictures = true %}{%- endif %}{%- endfor %}"
    "{%- endfor %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content[0].text | trim %}{%- set "
    "messages = messages[1:] %}{%- if found.pictures %}{{- raise_exception('not both') }}{%- endif %}{%- else %}{%- set "  # noqa: E501
    "system = '' %}{%- endif %}{%- if not found.pictures %}{{- '<pad>system\\n\\nToday: ' + strftime_now('%d %b %Y') + "
    "'\\n\\n' + system + '</s>' }}{%- endif %}{%- for message in messages %}{{- '<pad>' + message.role + '\\n\\n' }}"
    "{%- for content in message.content %}{%- if content.type == 'image' %}{{- '<image>' }}{%- else %}{{- content.text | "  # noqa: E501
    "trim }}{%- endif %}{%- endfor %}{{- '</s>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<pad>assistant\\n\\n' "  # noqa: E501
    "}}{%- endif %}"
)
FORMS = {"llava": LLAVA, "qwen": QWEN, "mistral": MISTRAL, "mllama": MLLAMA, "behind texts": VIDEO_TEMPLATE}
HALF_FORMS = {  # forms of pictures before words; between them, or alone, they are written in another way
    "a sign behind words": QWEN.replace(
        "<pad><image><pad>", "{{ '@' if message['content'][0]['type'] == 'text' }}<pad><image><pad>"
    ),
    "a sign alone": QWEN.replace("<pad><image><pad>", "{{ '@' if message['content'] | length < 2 }}<pad><image><pad>"),
}
FILMS = "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}<video>\n{% endfor %}"
VIDEO_FORMS = {  # with videos, behind the pictures or where they are
    "llava": LLAVA.replace("{% endfor %}", "{% endfor %}" + FILMS, 1),
    "qwen": QWEN.replace("{% else %}", "{% elif content['type'] == 'video' %}<pad><video><pad>{% else %}"),
}

# Templates that are no list of segments, and what is said of them.
NO_FORMS = {
    "numbered pictures": (
        QWEN.replace("<pad><image><pad>", "{{ loop.index }}: <image>"),
        "does not write every picture alike",
    ),
    "texts twice": ("{% for m in messages %}{{ m.content[-1].text }}{{ m.content[-1].text }}{% endfor %}", "once"),
    "a date of the week": (MLLAMA.replace("%d %b %Y", "%U"), "it writes a date as '%U'"),
    "upper case": (LLAVA.replace("content['text']", "content['text'] | upper"), "once"),
    "by turns": (
        QWEN.replace("</s>\n{% endfor %}", "{{ loop.index if loop.index > 4 }}</s>\n{% endfor %}"),
        "differ from it",
    ),
}
