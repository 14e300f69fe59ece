"""From requests on the wire to requests to an engine: prompts as token ids, options as the engine takes them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from raymodels.serve.conversation import Message, Tool
from raymodels.serve.engine import GenerateRequest, Sampling
from raymodels.serve.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Problem,
    Refused,
    Request,
    TokenizeChatRequest,
    TokenizeRequest,
    refused,
)
from raymodels.serve.text import Text
from raymodels.serve.tools import OPEN, without_tool_roles

DEFAULT_MAX_TOKENS = 16
"""Of a completion; a chat goes on to the end of the context."""

LEAST = 1e-6
"""Below this, a temperature or a ``top_p`` leaves only the likeliest token, and dividing by it only overflows."""


@dataclass(frozen=True)
class Translator:
    """Translates for one model.

    Args:
        reference: NAME@3, for messages.
        context: most tokens of prompt and output together.
        max_choices: how many may be running and waiting at once.
    """

    text: Text
    reference: str
    context: int
    max_choices: int

    @property
    def tagged(self) -> bool:
        """Whether the model writes calls of tools between tags."""
        return OPEN in (self.text.chat_template or "")

    def parts(self, request: Request, adapter: str | None) -> list[GenerateRequest]:
        """One engine request per prompt, without its grammar, for an adapter of the model or for the model alone.

        Raises:
            Refused: 400, names the field.
        """
        prompts = self._prompts(request)
        if len(prompts) * request.n > self.max_choices:
            message = f"{len(prompts)} prompts with n {request.n} are over the {self.max_choices} choices held at once"
            raise refused(f"{message}: send fewer", "prompt" if isinstance(request, CompletionRequest) else "n")
        return [self._part(request, tokens, adapter) for tokens in prompts]

    def tokens(self, request: TokenizeRequest | TokenizeChatRequest) -> list[int]:
        """The token ids that a tokenizer route is asked for; raises as `parts`."""
        if isinstance(request, TokenizeRequest):
            return self._encode(request.prompt, "prompt", request.add_special_tokens)
        text = self._chat(request.messages, request.tools, request.add_generation_prompt)
        return self._encode(text, "messages", request.add_special_tokens)

    def inputs(self, request: EmbeddingRequest) -> list[list[int]]:
        """The token ids of each text to embed; raises as `parts`."""
        if len(request.inputs) > self.max_choices:
            raise refused(f"{len(request.inputs)} inputs are over the {self.max_choices} held at once", "input")
        inputs = [self._encode(each, "input") if isinstance(each, str) else each for each in request.inputs]
        for tokens in inputs:
            self.known(tokens, "input")
        return inputs

    def known(self, tokens: list[int], field: str) -> None:
        """
        Raises:
            Refused: 400 for a token id that the model does not have.
        """
        unknown = next((token for token in tokens if token >= self.text.size), None)
        if unknown is not None:
            raise refused(f"{field}: token id {unknown} is not in the vocabulary of {self.text.size}", field)

    def echoed(self, request: CompletionRequest) -> list[str]:
        """The text of each prompt."""
        return [each if isinstance(each, str) else self.text.decode(each) for each in request.prompts]

    def _part(self, request: Request, tokens: list[int], adapter: str | None) -> GenerateRequest:
        room = self.context - len(tokens)
        if isinstance(request, ChatRequest):
            max_tokens = request.max_completion_tokens or request.max_tokens or max(1, room)
            logprobs, prompt_logprobs = (request.top_logprobs if request.logprobs else None), None
        else:
            max_tokens = max(1, min(DEFAULT_MAX_TOKENS, room)) if request.max_tokens is None else request.max_tokens
            logprobs, prompt_logprobs = request.logprobs, request.logprobs if request.echo else None
        return GenerateRequest(
            id=uuid.uuid4().hex,
            tokens=tokens,
            max_tokens=max_tokens,
            n=request.n,
            sampling=self._sampling(request),
            stop=request.stops,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            adapter=adapter,
        )

    def _sampling(self, request: Request) -> Sampling:
        bias = tuple((int(token), value) for token, value in request.logit_bias.items())
        self.known([token for token, _ in bias], "logit_bias")
        return Sampling(
            temperature=request.temperature if request.temperature >= LEAST else 0.0,
            top_p=max(request.top_p, LEAST),
            top_k=max(0, request.top_k),
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=bias,
        )

    def _prompts(self, request: Request) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            prompts = [self._encode(each, "prompt") if isinstance(each, str) else each for each in request.prompts]
            for tokens in prompts:
                self.known(tokens, "prompt")
        else:
            prompts = [self._encode(self._chat(request.messages, request.callable_tools), "messages", special=False)]
        start = [] if self.text.start is None else [self.text.start]
        return [prompt or start for prompt in prompts]

    def _chat(self, messages: list[Message], tools: list[Tool], open_answer: bool = True) -> str:
        if not self.text.has_chat_template:
            raise refused(f"{self.reference} has no chat template: use /v1/completions", None)
        plain = [message.plain() for message in messages]
        definitions = [tool.plain() for tool in tools]
        if "tools" not in (self.text.chat_template or ""):
            plain, definitions = without_tool_roles(plain, tools), []
        try:
            return self.text.chat(plain, definitions, open_answer)
        except Exception as error:  # the template is the model's code, and may raise whatever it likes
            message = f"the model's chat template refuses this conversation: {error}"
            raise refused(message, "messages") from error

    def _encode(self, text: str, field: str, special: bool = True) -> list[int]:
        try:
            return self.text.encode(text, add_special_tokens=special)
        except UnicodeEncodeError as error:
            message = f"{field} holds a lone surrogate, which is no character: {error.reason}"
            raise Refused(Problem(status=400, message=message, param=field)) from error
