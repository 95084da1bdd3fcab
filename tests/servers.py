"""Servers to ask: llama.cpp's own, in a process that can be killed, and one that speaks as vLLM, as OpenAI, or badly.

python tests/servers.py FILE.gguf PORT          # llama.cpp's server with a model, until it is killed
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# --- a model as GGUF ------------------------------------------------------------------------------------------

_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, path: Path) -> Path:
    """A Llama folder in float32 as GGUF: the same weights, queries and keys in llama.cpp's order of rotary pairs."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"] | {row["content"]: row["id"] for row in tokenizer["added_tokens"]}
    pieces = sorted(words, key=words.__getitem__)
    assert sorted(words.values()) == list(range(config["vocab_size"])), "a vocabulary without gaps"
    control = {row["content"] for row in tokenizer["added_tokens"]}
    whole_words = tokenizer["model"]["type"] == "WordLevel"
    if whole_words:  # llama.cpp has no such kind: pieces that never merge, which it joins as they are
        pieces = [piece if piece in control else f"Ġ{piece}" for piece in pieces]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(width)
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_dimension_count(config.get("head_dim") or width // heads)
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_vocab_size(config["vocab_size"])
    kinds = {True: gguf.TokenType.BYTE, False: gguf.TokenType.NORMAL}
    out.add_tokenizer_model("gpt2" if whole_words else "llama")
    if whole_words:
        out.add_tokenizer_pre("gpt-2")
        out.add_token_merges(["Ġ a"])
    out.add_token_list(pieces)
    out.add_token_scores([-float(i) for i in range(len(pieces))])
    out.add_token_types([gguf.TokenType.CONTROL if p in control else kinds[p.startswith("<0x")] for p in pieces])
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_unk_token_id(words["<unk>"])
    out.add_add_bos_token(True)
    out.add_add_space_prefix(True)
    for name, weight in load_file(folder / "model.safetensors").items():
        values = weight.astype(np.float32)
        name = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, block, part = name.split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                count = heads if part == "self_attn.q_proj" else config["num_key_value_heads"]
                halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
            place = f"blk.{block}.{_PARTS[part]}"
        else:
            place = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name]
        out.add_tensor(f"{place}.weight", values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


# --- llama.cpp --------------------------------------------------------------------------------------------------


def serve(gguf: str, port: int, exact: bool) -> None:
    """llama.cpp's server until the process is killed; `exact`: nothing of it in half precision."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.model_alias = {"stories"}
    params.port = port
    params.n_ctx, params.n_parallel = 2048, 4
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.verbosity = 0
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


class LlamaServer:
    """llama.cpp's server in a process of its own, on a port that stays the same over restarts."""

    def __init__(self, gguf: Path, *, exact: bool = True) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._command = [sys.executable, __file__, str(gguf), str(self.port), *(["exact"] if exact else [])]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Until it listens."""
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("http"), "llama.cpp's server did not start"

    def kill(self) -> None:
        """At once, whatever it is about."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def llama_server(gguf: Path, *, exact: bool = True) -> Iterator[LlamaServer]:
    """A server while the block runs."""
    server = LlamaServer(gguf, exact=exact)
    server.start()
    try:
        yield server
    finally:
        server.kill()


# --- vLLM and OpenAI ----------------------------------------------------------------------------------------------

Fault = Callable[[int, dict[str, Any]], str]
"""What goes wrong with the n-th request after the probe's, by name; nothing if empty."""


class ApiServer:
    """Answers as vLLM does, as OpenAI's older completions did, or as a chat, with a model's own forward pass.

    Args:
        folder: a model, and its tokenizer.
        kind: vllm, echo, chat or top (that writes text, and tells the likeliest tokens by their text only).
        fault: what goes wrong.
    """

    name = "tiny"

    def __init__(self, folder: Path, kind: str = "vllm", fault: Fault = lambda n, body: "") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from audit.inventory import take_inventory
        from audit.target import Target

        self.kind, self.fault = kind, fault
        self.tokenizer = Target("target", take_inventory(folder)).tokenizer
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.went_wrong: Counter[str] = Counter()
        self.hold = 0.0
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> ApiServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer._listed(self)

            def do_POST(self) -> None:
                outer._answered(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:  # a client that hung up is no news
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """No more connections are taken."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> ApiServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- answers --------------------------------------------------------------------------------------

    def _listed(self, handler: BaseHTTPRequestHandler) -> None:
        row = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": "tests", "root": "tiny"}
        _send(handler, 200, {"object": "list", "data": [row | {"max_model_len": 64}]})

    def _answered(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            n = len(self.asked)
            self.asked.append((handler.path, body))
            self.headers.append(dict(handler.headers))
            fault = self.fault(n, body)
            self.went_wrong[fault] += 1
        if handler.path != ("/v1/chat/completions" if self.kind == "chat" else "/v1/completions"):
            return _send(handler, 404, {"error": {"message": f"no {handler.path} here"}})
        if fault == "429":
            return _send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": f"{self.hold:g}"})
        if fault.isdecimal():
            return _send(handler, int(fault), {"error": {"message": "out of order"}})
        if fault == "redirect":
            return _send(handler, 307, {}, {"Location": "http://127.0.0.1:9/v1/completions"})
        if fault == "hang":
            return time.sleep(self.hold)
        if isinstance(body.get("prompt"), list) and max(body["prompt"]) >= len(self.tokenizer):
            return _send(handler, 400, {"error": {"message": "token id out of vocabulary"}})
        answer = self._answer(body)
        _spoil(answer, fault, handler.headers.get("Authorization", ""))
        data = json.dumps(answer).encode()
        if fault == "truncated":
            data = data[: len(data) // 2]
        if fault == "cut":  # fewer bytes than announced
            _send(handler, 200, data, {"Content-Length": str(len(data))}, data[: len(data) // 2])
            return handler.connection.close()
        if fault == "drip":
            return _drip(handler, data, self.hold)
        return _send(handler, 200, data)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        import torch

        if self.kind == "chat":
            prompt = self.tokenizer("\n".join(m["content"] for m in body["messages"]))["input_ids"]
        elif isinstance(body["prompt"], str):
            prompt = self.tokenizer(body["prompt"])["input_ids"]
        else:
            prompt = body["prompt"]
        new = body.get("max_tokens", 16)
        with self._lock, torch.inference_mode():
            logprobs = self.model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
            written = self._written(prompt, logprobs, new, body)
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if len(written) == new else "stop"}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": text, "logprobs": None}
        if self.kind == "vllm":
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt, logprobs, body.get("prompt_logprobs"))
        if self.kind == "echo" and body.get("echo"):
            choice["logprobs"] = self._echo([*prompt, *written[:1]], logprobs, body["logprobs"])
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(written)}
        return {"id": "cmpl-1", "model": self.name, "choices": [choice], "usage": usage}

    def _written(self, prompt: Sequence[int], logprobs: Any, new: int, body: dict[str, Any]) -> list[int]:
        import torch

        ids = list(prompt)
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        for _ in range(new):
            if body["temperature"]:
                weights = (logprobs[-1].double() / body["temperature"]).softmax(-1)
                ids.append(int(torch.multinomial(weights, 1, generator=generator)))
            else:
                ids.append(int(logprobs[-1].argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                break
            logprobs = self.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        return ids[len(prompt) :]

    def _prompt_logprobs(self, ids: Sequence[int], logprobs: Any, count: int | None) -> list[Any] | None:
        """As vLLM: nothing of the first token; of each other its own and those of the likeliest, with ranks."""
        if count is None:
            return None
        rows: list[Any] = [None]
        for token, at in zip(ids[1:], logprobs, strict=False):
            named = {*at.topk(count).indices.tolist(), token}
            rows.append({
                str(i): {
                    "logprob": float(at[i]),
                    "rank": int((at > at[i]).sum()) + 1,
                    "decoded_token": self.tokenizer.decode([i]),
                }
                for i in named
            })  # fmt: skip
        return rows

    def _echo(self, ids: Sequence[int], logprobs: Any, count: int) -> dict[str, Any]:
        """As OpenAI's older completions: tokens by their text."""
        names = [self.tokenizer.decode([i]) for i in ids]
        values, tops = [None], [None]
        for token, at in zip(ids[1:], logprobs, strict=True):
            best = at.topk(count)
            values.append(float(at[token]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tops.append({self.tokenizer.decode([i]): value for i, value in pairs})
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": [0] * len(ids)}


def _spoil(answer: dict[str, Any], fault: str, key: str) -> None:
    """Make an answer wrong in a way that is still JSON."""
    choice = answer["choices"][0]
    rows = choice.get("prompt_logprobs")
    if fault == "fewer" and rows:
        rows.pop()
    if fault == "gap" and rows:
        rows[-1] = {}
    if fault == "likeliest missing" and rows:
        for row in rows[1:]:
            for token in [i for i, value in row.items() if value["rank"] == 1 and len(row) > 1]:
                del row[token]
    if fault in ("NaN", "positive", "text") and rows:
        for row in rows[1:]:
            for value in row.values():
                value["logprob"] = {"NaN": float("nan"), "positive": 0.5, "text": "-1.0"}[fault]
    if fault == "another model":
        answer["model"] = "tiny-mini"
    if fault == "another prompt":
        answer["usage"]["prompt_tokens"] += 1
    if fault == "no choice":
        answer["choices"] = []
    if fault == "broken off":
        choice["finish_reason"] = None
    if fault == "key":
        answer["id"] = key


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    answer: Any,
    headers: dict[str, str] | None = None,
    part: bytes | None = None,
) -> None:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    for name, value in (
        {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
    ).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data if part is None else part)
    handler.wfile.flush()


def _drip(handler: BaseHTTPRequestHandler, data: bytes, seconds: float) -> None:
    """A byte now and then: each in time, the whole never."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    until = time.monotonic() + seconds
    for i in range(len(data)):
        if time.monotonic() > until:
            handler.connection.close()
            return
        handler.wfile.write(data[i : i + 1])
        handler.wfile.flush()
        time.sleep(0.02)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), exact="exact" in sys.argv)
