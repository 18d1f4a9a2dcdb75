"""Chat templates as Jinja: the variables that they read, and their syntax errors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.errors import ConfigError


def check_arguments(
    tokenizer: Any, template: str, arguments: Mapping[str, Any]
) -> None:
    """Raises ConfigError for arguments that the template would not read."""
    if not arguments:
        return
    if template != "chat":
        raise ConfigError(
            f"task.template_arguments go with template chat, got template {template!r};"
            " leave them out."
        )
    import jinja2
    from jinja2 import meta

    source = tokenizer.get_chat_template(tools=arguments.get("tools"))
    extensions = ["jinja2.ext.loopcontrols", "jinja2.ext.do"]
    environment = jinja2.Environment(extensions=extensions)
    source = re.sub(r"{%(-?)\s*(end)?generation\s*(-?)%}", "", source)
    try:
        read = meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise syntax_error(tokenizer, error) from error
    read -= {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
    read -= set(tokenizer.special_tokens_map)
    for name in arguments:
        if name not in read:
            known = ", ".join(sorted(read)) or "none"
            raise ConfigError(
                f"task.template_arguments: the chat template reads no {name!r}; it "
                f"reads {known}."
            )


def syntax_error(tokenizer: Any, error: Any) -> ConfigError:
    """The error for a chat template that is no Jinja; it names the file."""
    folder = Path(tokenizer.name_or_path or ".")
    names = ("chat_template.jinja", "tokenizer_config.json")
    found = next((folder / n for n in names if (folder / n).is_file()), None)
    where = f" of {found or folder}" if tokenizer.name_or_path else ""
    return ConfigError(
        f"the chat template{where} has a syntax error in its line {error.lineno}: "
        f"{error.message}; correct it there, or choose another task.template."
    )
