"""From problems to prompt tokens, with hashes that say which tokenizer and template were used.

Token ids are the truth everywhere after this module: prompts, prefixes and completions are never
turned into text and tokenised again.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from prefixrl_mcore.config.data import PromptConfig
from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.records import Problem, Prompt

_DATE_STRING = "26 Jul 2024"
"""Passed to chat templates that print today's date (Llama 3.1), so that a prompt does not change
from one day to the next. It is the fallback date of those templates."""


class PromptRenderer:
    """Renders problems with one tokenizer and one template; identified by two hashes."""

    def __init__(self, tokenizer_folder: Path, config: PromptConfig) -> None:
        """Load the tokenizer.

        Args:
            tokenizer_folder: Hugging Face folder with the tokenizer and, if there is one,
                ``generation_config.json``.
            config: template and style.

        Raises:
            ValueError: if the folder has no tokenizer, no end token, no chat template although
                the style is ``chat``, or the template has unknown fields.
        """
        self._config = config
        self._folder = tokenizer_folder
        self._tokenizer = _load_tokenizer(tokenizer_folder)
        self._chat_template = self._read_chat_template() if config.style == "chat" else None
        self._user_turn("")
        self.stop_token_ids: tuple[int, ...] = self._read_stop_token_ids()
        """Tokens that end a completion: ``eos_token_id`` of ``generation_config.json``, or the
        tokenizer's end token."""
        self.tokenizer_hash: str = _tokenizer_hash(self._tokenizer)
        """SHA-256 (hex) over vocabulary, merges, added tokens and text processing."""
        self.chat_template_hash: str = self._prompt_hash()
        """SHA-256 (hex) over the chat template and the prompt settings."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self._tokenizer)

    @property
    def end_token_id(self) -> int:
        """The stop token that ends an ordinary completion: the tokenizer's own where it stops."""
        own = self._tokenizer.eos_token_id
        return own if own in self.stop_token_ids else self.stop_token_ids[0]

    def render(self, problem: Problem) -> Prompt:
        """Return the problem's prompt tokens.

        ``chat``: the chat template with a generation prompt. ``text``: the template's text,
        encoded with the special tokens that the tokenizer adds to any text (such as a start
        token).

        Raises:
            ValueError: if there are no tokens, or the prompt ends with a stop token.
        """
        turn = self._user_turn(problem.text)
        if self._chat_template is None:
            token_ids = self._tokenizer.encode(turn, add_special_tokens=True)
        else:
            token_ids = self._chat_token_ids(turn)
        if not token_ids or token_ids[-1] in self.stop_token_ids:
            raise ValueError(
                f"problem {problem.problem_id!r}: the prompt must not be empty and must not end "
                f"with a stop token, got {len(token_ids)} tokens ending with "
                f"{token_ids[-3:]}; check data.prompt.template and the tokenizer's post-processor"
            )
        return Prompt(problem=problem, token_ids=tuple(token_ids))

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that continues a prompt, without added special tokens.

        The text is tokenised by itself, so that the prompt's tokens stay what ``render`` returns:
        no token spans the boundary, as in sampling.
        """
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens, special tokens written out."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence decodes to one string"
        return text

    def completion_text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion, without the end token that it may finish with."""
        has_end = bool(token_ids) and token_ids[-1] in self.stop_token_ids
        return self.decode(token_ids[:-1] if has_end else token_ids)

    def _user_turn(self, text: str) -> str:
        """Fill the template."""
        try:
            return self._config.template.format(problem=text)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"data.prompt.template: {error!r}; the only field is {{problem}}; write other "
                f"braces twice ('{{{{' and '}}}}'), got {self._config.template!r}"
            ) from None

    def _chat_token_ids(self, turn: str) -> list[int]:
        """Apply the chat template; the tokenizer returns a mapping for one conversation."""
        system = self._config.system
        messages = [{"role": "system", "content": system}] if system is not None else []
        encoded = self._tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": turn}],
            chat_template=self._chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            date_string=_DATE_STRING,
        )
        assert isinstance(encoded, BatchEncoding), "return_dict=True returns a mapping"
        return list(encoded["input_ids"])

    def _read_chat_template(self) -> str:
        """Return the chat template's source."""
        try:
            return self._tokenizer.get_chat_template()
        except ValueError:
            raise ValueError(
                f"tokenizer {self._folder}: has no chat template, which data.prompt.style = "
                "'chat' needs; set data.prompt.style = 'text', or add chat_template.jinja to the "
                "folder"
            ) from None

    def _read_stop_token_ids(self) -> tuple[int, ...]:
        """Return the end tokens, from the generation config where it names any."""
        path = self._folder / "generation_config.json"
        value: Any = None
        if path.is_file():
            settings = read_json_object(path, remedy="download the model's files again")
            value = settings.get("eos_token_id")
        if value is None:
            value = self._tokenizer.eos_token_id
        stop = tuple(value) if isinstance(value, list) else (value,)
        if not stop or not all(isinstance(i, int) and 0 <= i < self.vocab_size for i in stop):
            raise ValueError(
                f"tokenizer {self._folder}: expected end tokens in 0..{self.vocab_size - 1}, got "
                f"{value!r}; set eos_token_id in generation_config.json"
            )
        return tuple(dict.fromkeys(stop))

    def _prompt_hash(self) -> str:
        """Hash everything besides the tokenizer that decides a prompt's tokens."""
        return _sha256(
            {
                "prompt": self._config.model_dump(mode="json"),
                "chat_template": self._chat_template,
                "date_string": _DATE_STRING,
            }
        )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, never from the network."""
    if not folder.is_dir():
        raise ValueError(
            f"tokenizer folder {folder}: does not exist; set model.path to a Hugging Face folder"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer folder {folder}: cannot be loaded: {error}") from error


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the tokenizer's content, whatever file layout it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # set by calls, not part of the tokenizer
            content.pop(transient, None)
        return _sha256(content)
    added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    return _sha256({"vocab": tokenizer.get_vocab(), "added_tokens": added})


def _sha256(content: object) -> str:
    """Return the hex digest of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
