"""Chat templates in the shapes that model families publish, each with the token that closes an assistant's turn."""

CHATML = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nPlease reason step by step.<|im_end|>\n'"
    " }}{% endif %}{%- for message in messages %}{{ '<|im_start|>' + message.role +"
    " '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
)
ASKS = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
TEMPLATES = {
    "Qwen2.5-Math": (CHATML + ASKS, "<|im_end|>"),
    "Qwen2.5, which always asks": (CHATML + "<|im_start|>assistant\n", "<|im_end|>"),
    "closed only between messages": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}",
        "<|im_end|>",
    ),
    "Qwen3": (
        "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set content = message.content %}"
        "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content }}{%- else %}"
        "{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- else %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and"
        " enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
        "<|im_end|>",
    ),
    "R1-Distill": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{bos_token}}"
        "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}"
        "{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content ="
        " message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
        "{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}",
        "<｜end▁of▁sentence｜>",
    ),
    "Llama 3": (
        "{% set loop_messages = messages %}{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday:'"
        " + strftime_now('%d %b %Y') + '<|eot_id|>' }}{% for message in loop_messages %}{{ '<|start_header_id|>' +"
        " message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "Mistral, which has no word for the assistant": (
        "{{ bos_token }}" + ALTERNATING + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
        " '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "Mistral, where a conversation must end with a question": (
        "{{ bos_token }}{% if messages[-1].role != 'user' %}{{ raise_exception('the last message must be a user') }}"
        "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
        " '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + ALTERNATING + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<end_of_turn>",
    ),
    "Phi-3": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] +"
        " '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'"
        "}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
        "{% endif %}",
        "<|end|>",
    ),
    "Granite": (
        "{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' +"
        " message['content'] + '<|end_of_text|>\n' }}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}",
        "<|end_of_text|>",
    ),
    "Cohere": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
        "{% elif message['role'] == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' +"
        " message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "Cohere R7B, whose answer has an end before the turn's": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ message.content }}<|END_OF_TURN_TOKEN|>{% else %}"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{{ message.content }}<|END_RESPONSE|>"
        "<|END_OF_TURN_TOKEN|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "OLMo 2, whose roles are plain text": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' +"
        " message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' +"
        " message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "GPT-OSS, which closes a message within a turn otherwise": (
        "{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{%- for message in"
        " messages %}{%- if message.role == 'assistant' %}{%- if loop.last and not add_generation_prompt %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}{%- else %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- else %}"
        "{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
        "<|return|>",
    ),
    "an earlier answer is dropped": (
        "<|im_start|>user\n{{ messages[-1].content if messages[-1].role == 'user' else messages[-2].content }}"
        "<|im_end|>\n{% if messages[-1].role == 'assistant' %}<|im_start|>assistant\n{{ messages[-1].content }}"
        "<|im_end|>\n{% elif add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "GLM-4, which closes no turn": (
        "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        None,
    ),
    "two tokens open a turn, and none closes it": (
        "{{ bos_token }}{% for message in messages %}<|im_start|><|{{ message.role }}|>{{ message.content }}"
        "{% endfor %}",
        None,
    ),
    "plain text, whose empty lines are tokens": (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        None,
    ),
    "plain text": ("{% for message in messages %}{{ message.content }}\n{% endfor %}", None),
    "one question alone": (
        "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}Q: {{ messages[0].content }}"
        "\nA:",
        None,
    ),
    "what marks an assistant's words": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% generation %}{{ message.content }}<|im_end|>"
        "{% endgeneration %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
}
