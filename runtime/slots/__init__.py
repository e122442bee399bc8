"""Several conversations at once on fixed slots: a request joins while others are answered, and leaves when it is done.

>>> with Engine(bundle, backend) as engine:  # doctest: +SKIP
...     request = engine.prepare([Message("user", Prompt("What is this? ", Image("cat.png")))])
...     for token in engine.submit(request):
...         print(token.text, end="", flush=True)
"""

from vlmtrim.runtime.slots.answer import Answer, AnswerTimes, Token
from vlmtrim.runtime.slots.engine import Busy, Closed, Engine, State
from vlmtrim.runtime.slots.request import Message, Request

__all__ = ["Answer", "AnswerTimes", "Busy", "Closed", "Engine", "Message", "Request", "State", "Token"]
