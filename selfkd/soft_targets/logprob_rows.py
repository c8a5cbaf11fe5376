"""Log-probabilities of tokens in the forms that servers return them."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_LEAST = -60_000.0  # as in half precision, below which a probability is 0
_ABOVE = 1e-3  # by which rounded probabilities may exceed 1
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenStrings:
    """Ids of tokens by the text or the bytes that a server returns for them.

    Args:
        tokenizer: Tokenizer of `transformers` or `tokenizers`.

    Attributes:
        size: Number of tokens.
        parts: Number of tokens so far that are parts of a character, and so have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._names: dict[str, int] = tokenizer.get_vocab()
        self.size = max(self._names.values()) + 1
        self.parts = 0
        byte_level = "Ġ" in self._names and "▁" not in self._names
        alphabet = _byte_alphabet() if byte_level else None
        self._ids: dict[bytes, int] = {}
        fallbacks = {}
        for name, number in self._names.items():
            if match := _BYTE.fullmatch(name):
                fallbacks[bytes([int(match[1], 16)])] = number
            else:
                self._ids.setdefault(_bytes_of(name, alphabet), number)
        self._ids = fallbacks | self._ids
        self._texts = {number: data for data, number in self._ids.items()}

    def find(self, text: str, data: Sequence[int] | None = None) -> int | None:
        """Return the id of a token, None of a part of a character that is given as text.

        Args:
            text: Text of the token, or `token_id:` and its id.
            data: Its bytes; None if not given.

        Raises:
            ValueError: A token that is not in the vocabulary.
        """
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        if text.startswith("bytes:") and data is None:
            data = list(
                codecs.decode(text.removeprefix("bytes:"), "unicode_escape").encode("latin-1")
            )
        key = text.encode() if data is None else bytes(data)
        found = self._ids.get(key, self._names.get(text))
        if found is None and "\ufffd" in text:
            self.parts += 1
        elif found is None:
            raise ValueError(
                f"tokens must be those of tokenizer, got {text!r}: the teacher's must be the same"
            )
        return found

    def find_name(self, name: str) -> int | None:
        """Return the id of a token by its name in the vocabulary, such as `Ġthe`."""
        return self._names.get(name)

    def text_of(self, number: int) -> str | None:
        """Return the text of a token; None where it is a part of a character."""
        try:
            return self._texts[number].decode()
        except (KeyError, UnicodeDecodeError):
            return None


def _bytes_of(name: str, alphabet: Mapping[str, int] | None) -> bytes:
    if alphabet is None:
        return name.replace("▁", " ").encode()
    try:
        return bytes(alphabet[character] for character in name)
    except KeyError:  # an added token
        return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in which byte-level tokenizers write it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    characters = [*map(chr, plain), *(chr(256 + place) for place in range(len(others)))]
    return dict(zip(characters, [*plain, *others], strict=True))


class Entry(NamedTuple):
    """The most probable tokens at a position."""

    tokens: list[Any]
    """Ids, or texts, or texts with their bytes."""
    logprobs: list[Any]
    """Log-probability of each."""
    own: Any = None
    """Token that is there, as those of `tokens`; None if not said."""
    texts: Sequence[Any] = ()
    """Text of each id; None or nothing if not said."""
    has_own: bool = False
    """Whether the token that is there must be among `tokens`."""

    def by_id(
        self, strings: TokenStrings | None, vocabulary: int, token: int | None
    ) -> dict[int, float]:
        """Return the log-probability of each token by its id.

        Args:
            strings: Ids of tokens by text; None without a tokenizer.
            vocabulary: Number of tokens.
            token: Id of the token of the data set; None to leave out its check.

        Raises:
            ValueError: Tokens that are not in the vocabulary, another text than the data set's, or
                numbers that are no log-probabilities.
        """
        found: dict[int, float] = {}
        if len(self.tokens) != len(self.logprobs):
            counts = f"{len(self.logprobs)} of {len(self.tokens)} tokens"
            raise ValueError(f"must have a log-probability of each token, got {counts}")
        for place, (each, value) in enumerate(zip(self.tokens, self.logprobs, strict=True)):
            number = _id(each, strings)
            if number is None:
                continue
            if not 0 <= number < vocabulary:
                raise ValueError(f"tokens must be in [0, {vocabulary}), got {number}")
            if isinstance(each, int) and number in found:
                raise ValueError(f"tokens must be different ones, got {number} twice")
            _check_text(number, self.texts[place] if self.texts else None, strings)
            found[number] = _log_probability(value)
        if token is not None:
            self._check_own(found, strings, token)
        total = sum(math.exp(value) for value in found.values())
        if total > 1 + _ABOVE:
            raise ValueError(f"probabilities must sum to at most 1, got {total:.4f}")
        return found

    def _check_own(
        self, found: Mapping[int, float], strings: TokenStrings | None, token: int
    ) -> None:
        own = None if self.own is None else _id(self.own, strings)
        if (own is not None and own != token) or (self.has_own and token not in found):
            got = own if own is not None else sorted(found)[:8]
            text = None if strings is None else strings.text_of(token)
            named = token if text is None else f"{token} ({text!r})"
            raise ValueError(f"must be of the dataset's text, with token {named} there, got {got}")


def _id(token: Any, strings: TokenStrings | None) -> int | None:
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    text, data = token if isinstance(token, tuple) else (token, None)
    if not isinstance(text, str):
        raise ValueError(f"tokens must be ids or texts, got {text!r}")
    if strings is None:
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        raise ValueError(f"tokenizer must be given for tokens as text, got {text!r}")
    return strings.find(text, data)


def _check_text(number: int, text: Any, strings: TokenStrings | None) -> None:
    """Raise ValueError for another text than the tokenizer's, but for spaces around it."""
    if not isinstance(text, str) or strings is None or "\ufffd" in text:
        return
    known = strings.text_of(number)
    same = known is None or known.strip() == text.strip() or strings.find_name(text) == number
    if text and not same:
        raise ValueError(
            f"tokens must be those of tokenizer, got {text!r} as token {number}, which is {known!r}"
        )


def _log_probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= _ABOVE:
        raise ValueError(f"log-probabilities must be numbers of at most 0, got {value!r}")
    return max(float(value), _LEAST)


def entries_of(line: Any, item: int | None, tokens: NDArray[np.int64] | None) -> list[Entry]:
    """Return what a line has for the last tokens of an item, without those that have none.

    Args:
        line: JSON of the line.
        item: Number of the item; None to leave out its check.
        tokens: Tokens of the item; None to leave out their check.

    Raises:
        ValueError: A line of another form, or of another item.
    """
    if not isinstance(line, Mapping):
        raise ValueError(f"must be an object, got {type(line).__name__}")
    if item is not None and isinstance(line.get("index"), int) and line["index"] != item:
        raise ValueError(f"index must be {item}, the number of the item, got {line['index']}")
    if isinstance(line.get("response"), Mapping):
        line = line["response"].get("body", line["response"])
    entries, ids = list(_vllm(line.get("prompt_logprobs"))), line.get("prompt_token_ids")
    ids = line.get("input_ids", ids)
    for name in ("choices", "outputs"):
        if isinstance(line.get(name), list) and line[name]:
            inner = line[name][0]
            entries += _vllm(inner.get("prompt_logprobs"))
            ids = None if ids is None else [*ids, *inner.get("token_ids", [])]
            line = {"prompt_logprobs": line.get("prompt_logprobs"), **inner}
            break
    entries += _generated(line)
    whole = bool(entries) and entries[0] is None  # from the first token on, which has none
    count, given = len(entries), [entry for entry in entries if entry is not None]
    if None in entries[count - len(given) :]:
        raise ValueError(
            "must have log-probabilities of all tokens after the first, got "
            f"{len(given)} of {count}"
        )
    if tokens is not None:
        if count > len(tokens) or (whole and count < len(tokens)):
            raise ValueError(f"must be of the item's {len(tokens)} tokens, got {count} of them")
        if ids is not None and list(ids)[: len(tokens)] != tokens.tolist()[: len(ids)]:
            raise ValueError(
                f"must be of the dataset's tokens {tokens[:8].tolist()}, got {list(ids)[:8]}"
            )
    return given


def _vllm(rows: Any) -> list[Entry | None]:
    """Return the entries of a list of `{id: logprob}`, each of which has the token there."""
    entries: list[Entry | None] = []
    for row in rows or []:
        if row is None:
            entries.append(None)
            continue
        if not isinstance(row, Mapping):
            raise ValueError(
                f"must have {{id: log-probability}} for each token, got {str(row)[:60]}"
            )
        given = list(row.values())
        texts = [v.get("decoded_token") if isinstance(v, Mapping) else None for v in given]
        values = [v["logprob"] if isinstance(v, Mapping) else v for v in given]
        entries.append(Entry([int(token) for token in row], values, texts=texts, has_own=True))
    return entries


def _generated(line: Mapping[str, Any]) -> list[Entry | None]:
    """Return the entries of `logprobs` in any form."""
    given = line.get("logprobs")
    if "ids" in line:
        if not isinstance(given, list) or len(given) != len(line["ids"]):
            raise ValueError("ids and logprobs must be lists of as many tokens")
        return [
            Entry(list(ids), list(values)) if ids else None
            for ids, values in zip(line["ids"], given, strict=True)
        ]
    if isinstance(given, list):
        return _vllm(given)
    if isinstance(given, Mapping) and given.get("content") is not None:
        return [_chat(row) for row in given["content"]]
    if isinstance(given, Mapping) and given.get("top_logprobs") is not None:
        owns = given.get("tokens") or [None] * len(given["top_logprobs"])
        return [
            None if not top else Entry(list(top), list(top.values()), own)
            for own, top in zip(owns, given["top_logprobs"], strict=True)
        ]
    if given is None and "prompt_logprobs" in line:
        return []
    raise ValueError(
        f"logprobs must be of a form that import_logprobs names, got {str(given)[:60]}"
    )


def _chat(row: Mapping[str, Any]) -> Entry:
    tokens = [row, *(row.get("top_logprobs") or [])]
    named = {(each["token"], tuple(each.get("bytes") or ()) or None): each for each in tokens}
    own = next(iter(named))
    return Entry(list(named), [each["logprob"] for each in named.values()], own)


def largest(
    rows: Sequence[Mapping[int, float]], top_k: int, vocabulary: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Return the largest logits of each row, their tokens, and the log-sum-exp of the others.

    A row with fewer is filled with other tokens, each with an even share of the rest.

    Args:
        rows: Log-probability of each token by its id.
        top_k: Number of tokens of each row.
        vocabulary: Number of tokens.

    >>> values, tokens, rest = largest([{2: math.log(0.5), 0: math.log(0.3)}], 3, 6)
    >>> tokens, np.exp(values + math.log(0.5)).round(2), np.exp(rest + math.log(0.5)).round(2)
    (array([[2, 0, 1]]), array([[0.5 , 0.3 , 0.05]], dtype=float32), array([0.15], dtype=float32))
    """
    values = np.empty((len(rows), top_k), np.float32)
    tokens = np.empty((len(rows), top_k), np.int64)
    rest = np.empty(len(rows), np.float32)
    for place, row in enumerate(rows):
        ordered = sorted(row.items(), key=lambda pair: -pair[1])[:top_k]
        ids = [number for number, _ in ordered]
        found = [value for _, value in ordered]
        left = max(0.0, 1 - math.fsum(map(math.exp, found)))
        missing = top_k - len(ids)
        if missing:
            others = vocabulary - len(ids)
            fresh = (number for number in range(vocabulary) if number not in row)
            ids += [next(fresh) for _ in range(missing)]
            found += [math.log(left / others) if left else _LEAST] * missing
            left *= (others - missing) / others
        shift = max(found)
        values[place] = np.asarray(found) - shift
        tokens[place] = ids
        rest[place] = math.log(left) - shift if left > 1e-9 else -math.inf
    return values, tokens, rest
