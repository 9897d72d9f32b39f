"""Prompt templates: from a question to the token ids that a response continues."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


class Encoder(Protocol):
    """The part of a tokenizer that prompts need; krl.hf.tokenizer tells more."""

    pad_id: int

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that begins a sequence."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]], /, **arguments: object) -> list[int]:
        """Token ids of {"role", "content"} messages, up to where the reply begins; arguments are the template's."""


Prompt = str | Sequence[Mapping[str, str]]  # a question, or a chat that ends with one
Template = Callable[..., list[int]]  # (tokenizer, prompt) -> token ids


def _encode_text(tokenizer: Encoder, prompt: Prompt, *, template: str, frame: str) -> list[int]:
    if not isinstance(prompt, str):
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(
            f"the prompt is a chat ({roles}), and the template {template!r} takes single questions; "
            "set config.data.template to 'chat' or 'chat_boxed'"
        )
    return tokenizer.encode_prompt(frame.replace("{prompt}", prompt))


def _encode_chat(
    tokenizer: Encoder, prompt: Prompt, *, behind: str = "", arguments: Mapping[str, object] | None = None
) -> list[int]:
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    chat[-1] = {**chat[-1], "content": chat[-1]["content"] + behind}
    variables = dict(arguments or {})
    system = variables.pop("system_prompt", None)
    if system is not None and chat[0]["role"] not in ("system", "developer"):
        chat.insert(0, {"role": "system", "content": str(system)})
    return tokenizer.encode_chat(chat, **variables)


TEMPLATES: dict[str, Template] = {
    "raw": functools.partial(_encode_text, template="raw", frame="{prompt}"),
    "boxed": functools.partial(_encode_text, template="boxed", frame="{prompt}" + BOXED),
    "chat": _encode_chat,
    "chat_boxed": functools.partial(_encode_chat, behind=BOXED),
}


def find_template(template: str, arguments: Mapping[str, object] | None = None) -> Template:
    """The function of a template.

    Args:
        template: "raw" for the question alone, "boxed" with a request to box the answer after it, "chat" and
            "chat_boxed" for the same as a user's message in the tokenizer's chat template, or any text with
            {prompt} where the question goes.
        arguments: values of the chat template's variables by name, such as {"enable_thinking": False}; a
            "system_prompt" is instead the system message of chats that have none.

    Returns:
        (tokenizer, question or chat) -> token ids. A chat goes to a chat template whole; the others take none.

    Raises:
        ValueError: neither a name nor a text with {prompt}, or arguments for a template that is no chat template.
    """
    if template not in TEMPLATES and "{prompt}" not in template:
        raise ValueError(f"the template {template!r} is none of {', '.join(TEMPLATES)} and has no {{prompt}} in it")
    found = TEMPLATES.get(template) or functools.partial(_encode_text, template=template, frame=template)
    if not arguments:
        return found
    if not template.startswith("chat") or template not in TEMPLATES:
        raise ValueError(f"the template {template!r} takes no arguments; 'chat' and 'chat_boxed' do")
    return functools.partial(found, arguments=arguments)
