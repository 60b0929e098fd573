"""A model behind vLLM's own OpenAI-compatible server, which spreads it over GPUs and machines.

A request is tried a few times; where that does not help, a ChildProcessError says so in one line."""

import http.client
import json
import os
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import torch

from distil import flags
from distil.artifacts import DAMAGE, refuse
from distil.prompts import load_tokenizer

TRIES, PAUSE = 4, 2.0  # of a request; seconds before the second, doubled before each of the others
NOBODY = (ConnectionRefusedError, socket.gaierror)  # no server at that port, no such host: final at first
FAILURES = (OSError, http.client.HTTPException, LookupError, RuntimeError, *DAMAGE)  # no usable answer


def add_server_flags(p, flag):
    p.add_argument(f"--{flag}", type=flags.url, metavar="URL", help="vLLM's server of the model")
    p.add_argument("--server_requests", type=flags.positive_int, default=64, help="at the same time")
    p.add_argument("--server_timeout", type=flags.positive_int, default=600, help="seconds for a request")


class Server:
    """A client of a server's model, which uses the token ids below vocab_size."""

    def __init__(self, url, flag, vocab_size, requests, timeout):
        self.url, self.vocab_size, self.requests, self.timeout = url, vocab_size, requests, timeout
        self.where, self.model, self.failure, self.failed = f"{flag} {url}", None, None, threading.Event()
        self.opener = urllib.request.OpenerDirector()  # no proxy, no redirection
        for handler in (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
            self.opener.add_handler(handler)
        self.pool = ThreadPoolExecutor(requests)

    def ask(self, path, read, **body):
        """read(the answer to a request). Once one has failed for good, no other is tried again."""
        data = json.dumps({"model": self.model, **body}).encode() if body else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        tries, why = 0, ""
        while tries < TRIES and not self.failed.wait(PAUSE * 2 ** (tries - 1) if tries else 0):
            tries += 1
            try:
                with self.opener.open(request, timeout=self.timeout) as answer:
                    if answer.status == 200:
                        return read(json.load(answer))
                    why = f"HTTP {answer.status}: {answer.read(500).decode(errors='replace')}"
                    if answer.status < 500 and answer.status != 429:
                        break
            except FAILURES as error:
                why = repr(error)
                if self.model is None and isinstance(getattr(error, "reason", None), NOBODY):
                    why = f"no server answers there ({error.reason}); is it running, and ready?"
                    raise self.fail(why) from error
        raise self.fail(f"{path} failed {tries} times: {why}")

    def fail(self, why):
        """The ChildProcessError that ends the run: of the first request that has failed for good."""
        self.failure = self.failure or f"{self.where}: {why}"
        self.failed.set()
        return ChildProcessError(self.failure)

    def score(self, response, k):
        """At the T response tokens the k likeliest tokens, {"top_logps", "top_ids"} (T, k); or, if k is 0,
        {"logps"} (T,) of the response's own. Rows of the model's head that pad it take part."""
        start, tokens = len(response.prompt_ids), response.response_ids

        def read(answer):
            rows = answer["choices"][0]["prompt_logprobs"][start:]
            own = torch.tensor([row[str(i)]["logprob"] for row, i in zip(rows, tokens, strict=True)])
            # a row also holds the response's own token, which may not be among the likeliest
            rows = [sorted((-one["logprob"], int(i)) for i, one in row.items())[:k] for row in rows]
            top = torch.tensor(rows, dtype=torch.float64).reshape(len(tokens), k, 2)
            return own, -top[..., 0].float(), top[..., 1].long()

        body = {"prompt": response.prompt_ids + tokens, "prompt_logprobs": k, "max_tokens": 1}
        own, top_logps, top_ids = self.ask("/v1/completions", read, **body)
        if own.max() > 1e-3:
            raise self.fail("gives no log-probabilities; start it without --logprobs-mode")
        if k and top_ids.max() >= self.vocab_size:
            raise self.fail(f"a row that only pads its head is among the {k} likeliest; use a smaller --k")
        return {"top_logps": top_logps, "top_ids": top_ids} if k else {"logps": own}


def connect(url, flag, model, directory, vocab_size, longest, requests, timeout):
    """The Server of a model whose tokenizer is in a directory; refused where it does not fit."""
    server, tokenizer = Server(url, flag, vocab_size, requests, timeout), load_tokenizer(directory, flag)
    read = lambda answer: [(str(c["id"]), str(c["root"]), int(c["max_model_len"])) for c in answer["data"]]
    try:
        served, names = server.ask("/v1/models", read), {model, os.path.realpath(directory)}
        mine = [card for card in served if names & {*card[:2], os.path.realpath(card[1])}]
        if not mine:
            what = " and ".join(f"{root} as {name}" for name, root, _ in served)
            raise server.fail(f"serves {what}, not {model}; start it with --served-model-name {model}")
        server.model, _, limit = mine[0]
        if limit < longest:
            raise server.fail(f"takes {limit} tokens, not {longest}; start it with --max-model-len {longest}")
        text = tokenizer.decode(sorted(tokenizer.get_vocab().values()))  # every token
        ids = server.ask("/tokenize", lambda answer: answer["tokens"], prompt=text, add_special_tokens=False)
        if ids != tokenizer.encode(text, add_special_tokens=False):
            raise server.fail(f"has another tokenizer than {directory}")
    except ChildProcessError as error:
        refuse(error, code=1)
    return server
