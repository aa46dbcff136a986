"""Judges to be questioned: a local model that speaks from a script, and a server that replies from one."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from renyi_engine.ensemble.config import ModelConfig
from renyi_engine.evaluation.refusal.judges import make_judge

from ...tokenizers_for_tests import byte_pair_tokenizer

CPU = ModelConfig(use_cpu=True)
THOUGHT = "Is it a direct_answer, or"
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# a generation prompt that can be asked not to think, and one that always begins a thought
OPENINGS = {
    "asked": "<|im_start|>assistant\n{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}",
    "always": "<|im_start|>assistant\n<think>\n",
}


@pytest.fixture
def plays(tmp_path, monkeypatch):
    """plays(opening, *rounds) -> (judge, prompts, limits): a judge that says rounds[i][row] when it is asked for the
    i-th time; what it was asked, [round][row], and how many tokens it was given, [round]."""

    def make(opening, *rounds):
        marks = ["<think>", "</think>", "<|START_THINKING|>", "<|END_THINKING|>"]
        template = TURNS + "{% if add_generation_prompt %}" + OPENINGS[opening] + "{% endif %}"
        tokenizer = byte_pair_tokenizer(template, control=marks)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, **sizes))
        # <eos> is not what ends a turn
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path / "judge")
        tokenizer.save_pretrained(tmp_path / "judge")
        judge = make_judge(f"model:{tmp_path / 'judge'}", compute=CPU)
        prompts, limits, left = [], [], []
        forward, generate = judge._model.forward, judge._model.generate

        def generate_next(**settings):
            assert settings["do_sample"] is False
            rows = zip(settings["input_ids"], settings["attention_mask"].bool(), strict=True)
            prompts.append([tokenizer.decode(row[mask]) for row, mask in rows])
            said = rounds[len(limits)]
            limits.append(settings["max_new_tokens"])
            assert len(said) == len(prompts[-1])
            left[:] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
            return generate(**settings)

        @functools.wraps(forward)
        def forward_next(*args, **kwargs):
            output = forward(*args, **kwargs)
            for logits, script in zip(output.logits, left, strict=True):
                logits[-1, script.pop(0) if script else tokenizer.eos_token_id] = 1e6
            return output

        monkeypatch.setattr(judge._model, "generate", generate_next)
        monkeypatch.setattr(judge._model, "forward", forward_next)
        return judge, prompts, limits

    return make


def completion(content: object, finish_reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


@pytest.fixture
def serve(monkeypatch):
    """serve(*replies) -> (base_url, requests): replies are (status, body) in turn, the last one for ever; a number is
    seconds of silence, and a function writes the reply itself."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    servers = []

    def start(*replies):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    reply = replies[min(len(requests), len(replies) - 1)]
                    requests.append((self.path, dict(self.headers.items()), body))
                if isinstance(reply, float):
                    time.sleep(reply)
                    return
                if callable(reply):
                    with contextlib.suppress(OSError):  # nobody listens any more
                        reply(self)
                    return
                self.send_response(reply[0])
                self.send_header("content-length", str(len(reply[1])))
                self.end_headers()
                self.wfile.write(reply[1])

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


OK = (200, completion("Indirect refusal."))
