"""Chat templates and patterns that never end, fill the memory or write without end: refused within seconds, by name."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from worlds import build_tiny, quiet_scan, tiny_case

from audit.errors import Refused
from audit.inventory import take_inventory
from audit.rendering import Renderer
from audit.rendering_worker import answer
from audit.target import Target

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USUAL = """\
{{- bos_token }}{% for message in messages -%}
<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}{% set ns = namespace(x='bot') %}<|{{ ns.x }}|>{% endif %}"""
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(build_tiny().models["original"], folder)
    return folder


def test_the_text_is_what_transformers_gives(model):
    (model / "chat_template.jinja").write_text(USUAL)
    target = Target("target", take_inventory(model))
    for prompt in ("Who?", "  «naïve» \u2028 {{ 1 + 1 }} \ud7ff\U0001f600", "a\nb\n"):
        message = [{"role": "user", "content": prompt}]
        text = target.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert target.context(prompt) == (text, "", False)
        assert text.startswith("<s>") == (target.tokenizer.bos_token == "<s>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'x'.ljust(3000000) }}", "it writes 3000000 characters"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{{ ''['__cl' ~ 'ass__'].mro() }}", "SecurityError"),
        ("{% if", "TemplateSyntaxError"),
    ],
)
def test_templates_that_fail(template, words):
    task = {"chat_template": template, "special": SPECIAL, "longest": 1 << 20, "prompt": "Who?"}
    assert words in answer(task)["error"]


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ 'x' * 10**11 }}", "fails .MemoryError"), ("{{ 10 ** (10 ** 9) }}", "takes more than 1 seconds")],
)
def test_templates_made_to_harm(tmp_path, template, words):
    with (
        Renderer(tmp_path / "chat_template.jinja", template, SPECIAL, seconds=1) as renderer,
        pytest.raises(
            Refused, match=rf"chat_template\.jinja: its chat template {words}.*; remove the template"
        ) as caught,
    ):
        renderer.render("Who?")
    assert str(caught.value).isprintable()


def test_a_template_that_harms_on_one_prompt_alone(tmp_path):
    template = "{% if 'Zoë' in messages[0]['content'] %}" + LOOP + "{% endif %}x"
    with Renderer(tmp_path / "chat_template.jinja", template, {}, seconds=1) as renderer:
        assert renderer.render("Who?") == "x"
        with pytest.raises(Refused, match="takes more than"):
            renderer.render("Zoë?")
        assert renderer.render("Who?") == "x", "what is known is known"
        began = time.monotonic()
        with pytest.raises(Refused, match="takes more than"):
            renderer.render("Another?")
        assert time.monotonic() - began < 0.5, "the process has ended, and no other is started"


def test_the_process_may_neither_write_nor_start_others():
    """What a template that broke out of its sandbox could do: the limits, asked of a process that lives under them."""
    import subprocess
    import sys

    code = """
import resource, subprocess, sys, tempfile
sys.path.insert(0, sys.argv[1])
import rendering_worker
rendering_worker.limit()
for name in ("FSIZE", "NPROC", "CORE"):
    assert resource.getrlimit(getattr(resource, "RLIMIT_" + name)) == (0, 0), name
try:
    bytearray(2 << 30)
except MemoryError:
    print("limited")
"""
    folder = Path(__file__).parents[1] / "audit"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "limited\n", done.stderr


def test_a_scan_of_such_a_model_is_refused(tmp_path, model):
    (model / "chat_template.jinja").write_text("{{ 'x' * 10**11 }}")
    case = tiny_case({"target": "original"}, ("forget", "retain", "holdout"), only="memorization", template="auto")
    case.models["target"] = model  # type: ignore[index]
    with pytest.raises(Refused, match=r"model/chat_template\.jinja: its chat template fails"):
        quiet_scan(case, tmp_path / "out")
    assert Target("target", take_inventory(model), template="plain").context("Who?") == ("Who?", " ", True)


def test_a_pattern_that_backtracks_for_ever(model, capfd):
    """No pattern repeats a repetition here, as the inventory would see; the matcher itself gives up."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    pattern = {"Regex": "(?:a|a?)+$"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(tokenizer))
    target = Target("target", take_inventory(model), template="plain")
    with pytest.raises(Refused, match=r"model: its tokenizer gives up on 'aaaa.*retry-limit.*; audit the model with"):
        target.encode("a" * 60 + "c", "x")
    capfd.readouterr()  # the matcher says so on its own
