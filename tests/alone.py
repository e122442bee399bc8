"""What a request of the slots gets alone: a session of one row, driven token by token. A second writing of the loop."""

from __future__ import annotations

import numpy as np

from vlmtrim import runtime
from vlmtrim.runtime.sampling import Sampler


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def answer_alone(session: runtime.Session, request: runtime.Request) -> dict:
    """Token ids, text, end and log-probabilities of the answer, and what the prefill kept."""
    session.reset()
    draw, stream, eos = Sampler(request.sampling), session.prompter.decode_stream(), session.contract.eos_token_ids
    prefill = session.prefill([request.ids], request.pictures)
    logits, ids, text, sure, ended = prefill.logits, [], "", [], None
    while ended is None:
        token = int(draw(logits)[0])
        ids.append(token)
        sure.append(float(log_softmax(logits[0])[token]))
        if token in eos:
            ended = "eos"
        else:
            text += stream.step(token)
            if len(ids) == request.max_new_tokens:
                ended = "length"
            elif session.room() < 1:
                ended = "capacity"
        found = [text.index(stop) for stop in request.stop if stop in text]
        if found:
            text, ended = text[: min(found)], "stop"
        if ended is None:
            logits = session.decode(np.array([token]))
    return {"ids": ids, "text": text, "ended": ended, "sure": sure, "prefill": prefill}


def assert_same(tokens: list[runtime.Token], alone: dict, cancelled: bool = False) -> None:
    """What was heard of an answer is what it is alone, or its beginning where it was cancelled."""
    said = [token for token in tokens if token.ended != "cancelled"]
    ids, text = [token.token_id for token in said], "".join(token.text for token in tokens)
    assert [token.index for token in tokens] == list(range(len(tokens)))
    if cancelled and tokens[-1].ended == "cancelled":
        assert ids == alone["ids"][: len(ids)] and len(ids) < len(alone["ids"])
        return
    assert (ids, text, tokens[-1].ended) == (alone["ids"], alone["text"], alone["ended"])
    assert all(token.ended is None for token in tokens[:-1])
    told = [token.logprob for token in said if token.logprob is not None]
    if told:
        np.testing.assert_allclose(told, alone["sure"], atol=1e-4)
