"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from eff_http import JsonRoute, bad_request
from fastapi import APIRouter, Request

from eff_serve.api import pictures
from eff_serve.api.chat import chat_prompt
from eff_serve.api.documented import errors
from eff_serve.api.models import served
from eff_serve.api.schema.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

router = APIRouter(route_class=JsonRoute, tags=["tokens"])


@router.post("/tokenize", responses=errors(400, 401, 404, 413, 503), response_model_exclude_unset=True)
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
    """Token ids of a text or of a conversation."""
    serving, _ = await served(request, body.model)
    engine, tokenizer = serving.engine, serving.tokenizer
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = await asyncio.to_thread(tokenizer.encode, body.prompt, add_special_tokens=special)
    else:
        pictures.check(body.messages or (), serving.eyes)
        ids = await asyncio.to_thread(chat_prompt, tokenizer, body)
    response = TokenizeResponse(count=len(ids), max_model_len=engine.max_model_len, tokens=ids)
    if body.return_token_strs:
        response.token_strs = [tokenizer.decode([token]) for token in ids]
    return response


@router.post("/detokenize", responses=errors(400, 401, 404, 413, 503))
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """Text of token ids."""
    serving, _ = await served(request, body.model)
    tokenizer = serving.tokenizer
    for i, token in enumerate(body.tokens):
        if token >= tokenizer.vocab_size:
            raise bad_request(
                f"tokens[{i}]: {token} is outside the vocabulary of {tokenizer.vocab_size}",
                f"tokens[{i}]",
                "invalid_value",
            )
    return DetokenizeResponse(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens))
