"""From requests on the wire to requests to an engine: prompts as token ids, options as the engine takes them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from raymodels.serve.conversation import AssistantMessage, Message, Tool
from raymodels.serve.encoding import SMALL, Answered, Encoder
from raymodels.serve.engine import GenerateRequest, Sampling
from raymodels.serve.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Request,
    TokenizeChatRequest,
    TokenizeRequest,
    refused,
)
from raymodels.serve.text import Text
from raymodels.serve.tools import OPEN, without_tool_roles

DEFAULT_MAX_TOKENS = 16
"""Of a completion; a chat goes on to the end of the context."""

MANY = 32
"""Messages and parts of them that are made a prompt at once, on the event loop."""
LEAST = 1e-6
"""Below this, a temperature or a ``top_p`` leaves only the likeliest token, and dividing by it only overflows."""


@dataclass(frozen=True)
class Translator:
    """Translates for one model.

    Args:
        encoder: of the same text.
        reference: NAME@3, for messages.
        context: most tokens of prompt and output together.
        max_choices: how many may be running and waiting at once.
    """

    text: Text
    encoder: Encoder
    reference: str
    context: int
    max_choices: int

    @property
    def tagged(self) -> bool:
        """Whether the model writes calls of tools between tags."""
        return OPEN in (self.text.chat_template or "")

    async def parts(self, request: Request, adapter: str | None) -> list[GenerateRequest]:
        """One engine request per prompt, without its grammar, for an adapter of the model or for the model alone.

        Raises:
            QueueFull: too many prompts wait to be encoded.
            Refused: 400, names the field.
        """
        prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        if prompts * request.n > self.max_choices:
            message = f"{prompts} prompts with n {request.n} are over the {self.max_choices} choices held at once"
            raise refused(f"{message}: send fewer", "prompt" if isinstance(request, CompletionRequest) else "n")
        return [self._part(request, tokens, adapter) for tokens in await self._prompts(request)]

    async def tokenized(self, request: TokenizeRequest | TokenizeChatRequest) -> Answered:
        """The answer to a request for token ids; raises as `parts`."""
        special, names = request.add_special_tokens, request.return_token_strs
        if isinstance(request, TokenizeRequest):
            return await self.encoder.tokenized(lambda: request.prompt, "prompt", special, names)

        def text() -> str:
            return self._chat(request.messages, request.tools, request.add_generation_prompt)

        return await self.encoder.tokenized(text, "messages", special, names)

    async def detokenized(self, tokens: list[int]) -> Answered:
        """The answer to a request for the text of token ids; raises as `parts`."""
        return await self.encoder.detokenized(tokens, self.known)

    async def inputs(self, request: EmbeddingRequest) -> list[list[int]]:
        """The token ids of each text to embed; raises as `parts`."""
        if len(request.inputs) > self.max_choices:
            raise refused(f"{len(request.inputs)} inputs are over the {self.max_choices} held at once", "input")
        inputs = await self.encoder.prompts(request.inputs, "input")
        for tokens in inputs:
            self.known(tokens, "input")
        return inputs

    def known(self, tokens: list[int], field: str) -> None:
        """
        Raises:
            Refused: 400 for a token id that the model does not have.
        """
        if max(tokens, default=0) >= self.text.size:  # in a tenth of the time of a loop, where there are a million
            unknown = next(token for token in tokens if token >= self.text.size)
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
        biased = list(map(int, request.logit_bias))
        self.known(biased, "logit_bias")
        bias = tuple(zip(biased, request.logit_bias.values(), strict=True))
        return Sampling(
            temperature=request.temperature if request.temperature >= LEAST else 0.0,
            top_p=max(request.top_p, LEAST),
            top_k=max(0, request.top_k),
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=bias,
        )

    async def _prompts(self, request: Request) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            prompts = await self.encoder.prompts(request.prompts, "prompt")
            for tokens in prompts:
                self.known(tokens, "prompt")
        else:
            given = request.messages, request.callable_tools
            text = self._chat(*given) if _small(*given) else await self.encoder.aside(self._chat, *given)
            prompts = await self.encoder.prompts([text], "messages", special=False)
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


def _small(messages: list[Message], tools: list[Tool]) -> bool:
    """Whether a conversation is made a prompt in no time. Tools and their calls may be of any size."""
    if tools or len(messages) > MANY:
        return False
    if any(isinstance(message, AssistantMessage) and message.tool_calls for message in messages):
        return False
    texts = [[each.content] if isinstance(each.content, str) else each.content[: MANY + 1] for each in messages]
    if sum(map(len, texts)) > 2 * MANY:
        return False
    return sum(len(part if isinstance(part, str) else part.text) for text in texts for part in text) <= SMALL
