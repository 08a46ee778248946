"""OpenAI's answers: whole ones and the chunks of a stream, from pieces of choices.

`Envelope(...)` has what every answer of a call repeats; `ChoiceShape(call, tokenizer, i)` turns
one choice's tokens into its JSON, whole or bit by bit. Nothing is written.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from phiforge.inference.interface import Completion, TopLogprobs
from phiforge.model.tokenizer import Tokenizer
from phiforge.serve.call import Call, PromptPart
from phiforge.serve.ticket import ServedToken

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's stand-in


SCORED = Completion("", (), None, "length")  # the answer where a prompt was scored alone


class TokenScore(NamedTuple):
    """One token as log-probabilities tell it; `logprob` None: a prompt's first token."""

    token_id: int
    logprob: float | None
    top: TopLogprobs


@dataclass(frozen=True)
class Envelope:
    """What every answer of a call repeats. `created`: Unix seconds."""

    call: Call
    id: str
    created: int
    model: str
    fingerprint: str

    def whole(self, choices: Sequence[dict[str, Any]], num_generated: int) -> dict[str, Any]:
        """The answer that is sent at once."""
        return self._named("") | {"choices": list(choices), "usage": self.usage(num_generated)}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """One event of a stream; with include_usage the others' usage is null, as OpenAI's is."""
        usage = {"usage": None} if self.call.include_usage else {}
        return self._named(".chunk") | {"choices": [choice]} | usage

    def last_chunk(self, num_generated: int) -> dict[str, Any]:
        """The event that tells the usage, without choices."""
        return self._named(".chunk") | {"choices": [], "usage": self.usage(num_generated)}

    def usage(self, num_generated: int) -> dict[str, int]:
        """Tokens; a prompt counts once, however many choices it has."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.call.prompts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }

    def _named(self, suffix: str) -> dict[str, Any]:
        kind = "chat.completion" + suffix if self.call.is_chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class ChoiceShape:
    """One choice of a call. Counts characters as its tokens pass, so give each token once."""

    def __init__(self, call: Call, tokenizer: Tokenizer, index: int) -> None:
        self._call, self._tokenizer, self.index = call, tokenizer, index
        self._prompt: PromptPart = call.prompts[index // call.n]
        self._offsets = _Offsets(tokenizer, 0 if call.echo else len(self._prompt.text))

    def echo(
        self, logprobs: Sequence[float], top_logprobs: Sequence[TopLogprobs]
    ) -> list[TokenScore]:
        """The prompt's tokens with the scores of all but the first."""
        ids = self._prompt.token_ids
        rest = zip(ids[1:], logprobs, top_logprobs, strict=True)
        return [TokenScore(ids[0], None, ()), *(TokenScore(*each) for each in rest)]

    def whole(self, echoed: Sequence[TokenScore], answer: Completion) -> dict[str, Any]:
        """The finished choice."""
        text, scores = answer.text, []
        if answer.logprobs is not None:
            top = answer.top_logprobs or ((),) * len(answer.logprobs)
            scores = [*map(TokenScore, answer.token_ids, answer.logprobs, top)]
        logprobs = self._logprobs([*echoed, *scores], len(echoed))
        ids = self._prompt_ids() | self._ids(answer.token_ids)
        if self._call.is_chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            said = {"text": self._prompt.text + text if self._call.echo else text}
        reason = answer.finish_reason
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": reason, **ids}

    def opening(self, echoed: Sequence[TokenScore]) -> Iterator[dict[str, Any]]:
        """The choice's stream before its tokens: a chat's role, a completion's echo, or nothing."""
        ids = self._prompt_ids()
        if self._call.is_chat:
            yield self._delta({"role": "assistant", "content": ""}, None, None) | ids
        elif self._call.echo or ids:
            text = self._prompt.text if self._call.echo else ""
            logprobs = self._logprobs(echoed, len(echoed)) if echoed else None
            yield self._delta(text, logprobs, None) | ids
        if self._call.sampling is None:
            yield self.ending(SCORED.finish_reason)

    def piece(self, tokens: Sequence[ServedToken]) -> Iterator[dict[str, Any]]:
        """New tokens; nothing where they are to be told later."""
        text = "".join(token.text for token in tokens)
        told = text or self._call.num_top is not None or self._call.return_token_ids
        if tokens and told:
            scores = [TokenScore(t.token_id, t.logprob, t.top_logprobs) for t in tokens]
            said = {"content": text} if self._call.is_chat else text
            ids = self._ids([token.token_id for token in tokens])
            yield self._delta(said, self._logprobs(scores, 0), None) | ids

    def ending(self, reason: str) -> dict[str, Any]:
        """The choice's last event."""
        return self._delta({} if self._call.is_chat else "", None, reason)

    def _delta(self, said: Any, logprobs: Any, reason: str | None) -> dict[str, Any]:
        name = "delta" if self._call.is_chat else "text"
        return {"index": self.index, name: said, "logprobs": logprobs, "finish_reason": reason}

    def _ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(token_ids)} if self._call.return_token_ids else {}

    def _prompt_ids(self) -> dict[str, Any]:
        wanted = self._call.return_token_ids
        return {"prompt_token_ids": list(self._prompt.token_ids)} if wanted else {}

    def _logprobs(self, scores: Sequence[TokenScore], num_echoed: int) -> dict[str, Any] | None:
        """Log-probabilities of tokens, the first `num_echoed` of them the prompt's."""
        if self._call.num_top is None:
            return None
        if self._call.is_chat:
            content = [chat_logprob(self._tokenizer, score) for score in scores]
            return {"content": content, "refusal": None}
        ids = [score.token_id for score in scores]
        return {
            "text_offset": [self._offsets.take(t, i < num_echoed) for i, t in enumerate(ids)],
            "tokens": [token_name(self._tokenizer, token_id) for token_id in ids],
            "token_logprobs": [_finite(score.logprob) for score in scores],
            "top_logprobs": [top_by_name(self._tokenizer, score) for score in scores]
            if self._call.num_top
            else None,
        }


class _Offsets:
    """Where each token begins, in characters, from a prompt's start."""

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        self._tokenizer, self._at = tokenizer, start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token_id: int, echoed: bool) -> int:
        """The token's place; an answer's special tokens take none, an echo shows its own."""
        shown = echoed or token_id not in self._tokenizer.special_ids
        data = self._tokenizer.token_bytes(token_id) if shown else b""
        if data and data[0] & 0xC0 != 0x80:  # a new character: what hangs is a lost one, U+FFFD
            self._at += len(self._decoder.decode(b"", final=True))
        at = self._at
        self._at += len(self._decoder.decode(data))
        return at


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a text; one that is no whole text as OpenAI spells it: bytes:\\xe2\\x80."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + _escaped(data)


def top_by_name(tokenizer: Tokenizer, score: TokenScore) -> dict[str, float] | None:
    """The likeliest tokens and the token itself; of two with one name the likelier counts."""
    if score.logprob is None:
        return None
    named: dict[str, float] = {}
    for token_id, logprob in [*score.top, (score.token_id, score.logprob)]:
        name = token_name(tokenizer, token_id)
        named[name] = max(_finite(logprob), named.get(name, -math.inf))
    return named


def chat_logprob(tokenizer: Tokenizer, score: TokenScore) -> dict[str, Any]:
    """One entry of a chat's logprobs.content."""
    own = _chat_token(tokenizer, score.token_id, score.logprob)
    return own | {"top_logprobs": [_chat_token(tokenizer, *each) for each in score.top]}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    try:
        name = data.decode()
    except UnicodeDecodeError:
        name = _escaped(data)
    return {"token": name, "logprob": _finite(logprob), "bytes": list(data)}


def _escaped(data: Iterable[int]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> Any:
    if logprob is None:
        return None
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB
