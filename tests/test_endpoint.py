"""Models behind an API: numbers that agree with the weights', and servers that fail in every way a server can."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import ApiServer, LlamaServer, llama_server, write_gguf
from worlds import audit_here, build_tiny, one_thread, quiet_scan

from audit.case import Case, Options, read_case
from audit.endpoint.address import KEY, OPENAI_KEY, Endpoint, credential
from audit.endpoint.client import Client
from audit.endpoint.probe import probe
from audit.endpoint.target import EndpointTarget, written
from audit.endpoint.wire import Capabilities, Wire
from audit.errors import BadInput, Incomplete, NoAccess
from audit.instrument import Access
from audit.inventory import take_inventory
from audit.loaders import SetSpec
from audit.plan import Request, merge
from audit.quantities import MOMENTS, TOKEN, hidden, top_k
from audit.record import Record
from audit.target import Target
from audit.tokens import Tokens

SECRET = "sk-palimpsest-0123456789abcdef"
QUICK = {"timeout": 0.5, "retries": 3, "backoff": 0.01, "concurrency": 4}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.delenv(OPENAI_KEY, raising=False)
    with one_thread():
        yield


def tiny_folder() -> Path:
    return build_tiny().models["original"]


def endpoint(server: ApiServer, **more: Any) -> Endpoint:
    return Endpoint(server.url, server.name, **QUICK | more)


def opened(place: Endpoint, **options: Any) -> EndpointTarget:
    return EndpointTarget("target", probe(Client(place)), device="cpu", dtype=torch.float32, **options)


def local(folder: Path) -> Target:
    return Target("target", take_inventory(folder), template="plain")


def case_of(target: Path | Endpoint, rows: int = 6, **options: Any) -> Case:
    specs = {name: SetSpec(build_tiny().sets[name], limit=rows) for name in ("forget", "retain", "holdout")}
    raw = {"template": "plain", "budget": "quick", "device": "cpu", "only": "memorization"} | options
    return Case.build({"target": target}, specs, Options.parse(raw, "test"), "endpoint")


def findings(record: Record) -> dict[str, tuple[float | None, ...]]:
    return {f.id: (f.estimate, *f.ci95) for f in record.findings}


def same(here: Record, there: Record, tolerance: float) -> None:
    ours, theirs = findings(here), findings(there)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=tolerance), name


@cache
def texts(folder: Path) -> tuple[Tokens, ...]:
    """Rows of the tiny world, scored from different places on."""
    target, case = local(folder), case_of(folder)
    return tuple(target.encode(row.prompt, row.answer) for name in case.sets for row in case.rows(name))


def passed(folder: Path, tokens: Tokens) -> torch.Tensor:
    """Log-probabilities by the model's own forward pass, at the places that predict the scored tokens."""
    with torch.inference_mode():
        logits = local_model(folder)(torch.tensor([tokens.ids])).logits[0]
    return logits.log_softmax(-1)[tokens.start - 1 : -1]


@cache
def local_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- the address and the key --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://user:pw@host/v1", "https://host/v1?api-key=sk-1", "http://host/#sk-1", "http://[::1/v1"]
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(BadInput) as refused:
        Endpoint(url, "m")
    assert not any(part in str(refused.value) for part in ("pw", "sk-1", "host/"))


@pytest.mark.parametrize("url", ["ftp://host/v1", "file:///etc/passwd", "host:8000", "http://", "http://a b/v1"])
def test_only_http_is_asked(url):
    with pytest.raises(BadInput, match="URL"):
        Endpoint(url, "m")


def test_an_address_goes_through_a_case_file_and_back(tmp_path):
    table = '{ endpoint = "http://127.0.0.1:9", model = "m", tokenizer = "words", token_budget = 5, timeout = 2.5 }'
    (tmp_path / "case.toml").write_text(f"[models]\ntarget = {table}\n")
    _, models, _, _ = read_case(tmp_path / "case.toml")
    place = models["target"]
    assert place == Endpoint("http://127.0.0.1:9/v1", "m", tokenizer=tmp_path / "words", token_budget=5, timeout=2.5)
    again = tmp_path / "again.toml"
    again.write_text(Case.build(models, {}, Options(), "c").to_toml())
    assert read_case(again)[1] == models
    for wrong in ('model = "m"', 'endpoint = "http://h", model = "m", key = "k"', 'endpoint = "http://h", model = 3'):
        (tmp_path / "case.toml").write_text(f"[models]\ntarget = {{ {wrong} }}\n")
        with pytest.raises(BadInput, match="target"):
            read_case(tmp_path / "case.toml")


def test_a_key_goes_to_whom_it_is_meant_for(monkeypatch):
    monkeypatch.setenv(OPENAI_KEY, SECRET)
    assert credential(Endpoint("https://api.openai.com/v1", "m")) == SECRET
    for other in ("https://example.org/v1", "https://openai.com.example.org/v1", "https://notopenai.com/v1"):
        assert credential(Endpoint(other, "m")) is None
    monkeypatch.setenv(KEY, "another")
    assert credential(Endpoint("https://example.org/v1", "m")) == "another"
    monkeypatch.setenv(KEY, f"{SECRET}\nX-Header: 1")
    with pytest.raises(BadInput) as refused:
        credential(Endpoint("https://example.org/v1", "m"))
    assert SECRET not in str(refused.value)


# --- llama.cpp ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """llama.cpp's server with stories260k, in float32 throughout."""
    pytest.importorskip("xllamacpp")
    with llama_server(write_gguf(stories, tmp_path_factory.mktemp("gguf") / "stories.gguf")) as server:
        yield server


@pytest.fixture(scope="module")
def by_llama(llama: LlamaServer, stories: Path) -> EndpointTarget:
    return opened(Endpoint(llama.url, "stories", tokenizer=stories, timeout=20, backoff=0.05), template="plain")


def test_llama_is_seen_for_what_it_is(by_llama):
    can = by_llama.inventory.can
    assert (can.api, can.scores, can.whole, can.likeliest) == ("completions", "forced", True, 512)
    assert can.context == 512 and by_llama.inventory.parameters == 260032
    assert by_llama.inventory.access == Access.LOGPROBS
    assert any("reported before it" in line for line in by_llama.inventory.limits)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_llama_gives_the_weights_numbers(by_llama, stories, data):
    """Any tokens at all, parts of characters and control tokens among them."""
    ids = tuple(data.draw(st.lists(st.integers(0, 511), min_size=2, max_size=12)))
    tokens = Tokens((1, *ids), data.draw(st.integers(1, len(ids))))
    quantities = (TOKEN, MOMENTS, top_k(5))
    engine = by_llama.engine()
    (row,) = engine.run(engine.batches(merge([Request("r", (tokens,), quantities)]))[0])
    expected = passed(stories, tokens)
    at = torch.arange(tokens.scored)
    own = expected[at, torch.tensor(tokens.ids[tokens.start :])]
    np.testing.assert_allclose(row.values["token"]["logprob"], own.numpy(), atol=2e-4)
    best = expected.topk(2).values
    clear = ((best[:, 0] - best[:, 1]) > 1e-3).numpy()  # in a tie the last digit decides
    match = (expected.argmax(1) == torch.tensor(tokens.ids[tokens.start :])).numpy()
    np.testing.assert_array_equal(row.values["token"]["match"][clear], match[clear])
    entropy = -(expected.exp() * expected).sum(1)
    np.testing.assert_allclose(-row.values["moments"]["mean"], entropy.numpy(), atol=2e-4)
    np.testing.assert_allclose(row.values["top-5"]["top_logprobs"], expected.topk(5).values.numpy(), atol=2e-4)


def test_a_token_that_cannot_be_forced_has_its_number_from_the_likeliest_or_none(by_llama, stories):
    """llama.cpp says nothing of a written token that is half a character: <0xC3> is one."""
    half, can = 198, by_llama.inventory.can
    tokens = Tokens((1, 403, half), 2)
    expected = float(passed(stories, tokens)[0, half])
    shallow = replace(can, whole=False)
    wire = Wire("stories", shallow, by_llama.wire._instead)
    (ask,) = wire.score(tokens)
    assert ask.body["logprobs"] == 1000 and str(half) not in ask.body["logit_bias"]
    with pytest.raises(Incomplete, match="1000 were asked for"):  # 512 tokens are not 1000: never taken for enough
        by_llama.client.ask(replace(ask, repeat=7))
    (ask,) = Wire("stories", can, by_llama.wire._instead).score(tokens, 512)
    assert by_llama.client.ask(ask)[0].logprob == pytest.approx(expected, abs=2e-4)
    assert half in EndpointTarget.special_ids.fget(_as(by_llama, shallow)), "and no neighbour is made with it"


def _as(target: EndpointTarget, can: Capabilities) -> EndpointTarget:
    import copy

    other = copy.copy(target)
    other.inventory = replace(target.inventory, can=can)
    return other


def test_an_audit_of_llama_survives_its_server_and_says_what_the_weights_say(llama, stories, tmp_path):
    """Killed with SIGKILL when some answers are on disk, started again a little later; numbers as from the folder."""
    rows = tmp_path / "rows.jsonl"
    names = ("Lily", "Tim", "Ben", "Sue", "Max")
    told = [{"prompt": f"One day, {name}", "answer": "went to the park.", "entity": name} for name in names]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told))
    place = Endpoint(llama.url, "stories", tokenizer=stories, timeout=10, retries=12, backoff=0.05, concurrency=2)
    options = {"template": "plain", "budget": "quick", "device": "cpu", "only": "membership,memorization,remind"}

    def case(target: Path | Endpoint) -> Case:
        specs = {name: SetSpec(rows) for name in ("forget", "retain", "holdout")}
        return Case.build({"target": target}, specs, Options.parse(options, "test"), "llama")

    answers = tmp_path / "out" / "evidence"

    def strike() -> None:
        while sum(1 for _ in answers.glob("answers-*/*/*.json")) < 60 and not done.is_set():
            time.sleep(0.005)
        llama.kill()
        struck.append(sum(1 for _ in answers.glob("answers-*/*/*.json")))
        time.sleep(0.3)
        llama.start()

    done, struck = threading.Event(), list[int]()
    thread = threading.Thread(target=strike)
    thread.start()
    try:
        record = quiet_scan(case(place), tmp_path / "out")
    finally:
        done.set()
        thread.join()
    assert 60 <= struck[0] < sum(1 for _ in answers.glob("answers-*/*/*.json")), "struck in its midst"
    weights = quiet_scan(case(stories), tmp_path / "weights")
    same(record, weights, 2e-3)
    assert {"membership/min_k_plus_plus", "remind/known-likeness"} <= findings(record).keys()
    assert record.models["target"].architecture == "behind a completions API"
    assert record.environment.noise["target"] < 1e-3
    said = [(row.generated or "").strip() for row in record.examples]
    assert said == [(row.generated or "").strip() for row in weights.examples]


# --- vLLM's and OpenAI's shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "echo"])
def test_scores_are_the_weights(kind):
    folder = tiny_folder()
    with ApiServer(folder, kind) as server:
        target = opened(endpoint(server, tokenizer=folder), template="plain")
        assert target.inventory.can.scores == {"vllm": "prompt_logprobs", "echo": "echo"}[kind]
        engine = target.engine()
        rows = [row for batch in engine.batches(merge([Request("r", texts(folder))])) for row in engine.run(batch)]
        found = {row.tokens: row.values["token"] for row in rows}
        for tokens in texts(folder):
            expected = passed(folder, tokens)
            own = expected.gather(1, torch.tensor(tokens.ids[tokens.start :])[:, None])[:, 0].numpy()
            np.testing.assert_allclose(found[tokens]["logprob"], own, atol=1e-5)
            match = (expected.argmax(1) == torch.tensor(tokens.ids[tokens.start :])).numpy()
            np.testing.assert_array_equal(found[tokens]["match"], match)
        assert target.gives(TOKEN) and not target.gives(MOMENTS) and not target.gives(hidden("hook_embed"))
        assert target.gives(top_k(20)) == (kind == "vllm") and not target.gives(top_k(21))
        with pytest.raises(NoAccess, match="weights"):
            _ = target.model


@pytest.mark.parametrize(("kind", "api"), [("vllm", "completions"), ("chat", "chat")])
def test_without_a_tokenizer_text_goes_in_and_comes_out(kind, api):
    folder = tiny_folder()
    case = case_of(folder)
    with ApiServer(folder, kind) as server:
        target = opened(endpoint(server), template="plain")
        assert (target.inventory.can.api, target.inventory.access) == (api, Access.TEXT)
        prompts = [row.prompt for row in case.rows("forget")]
        ids = [target.encode_prompt(prompt, room=8) for prompt in prompts]
        assert [target.decode(one) for one in ids] == prompts
        said = [target.decode(new) for new in target.generate(ids, 8)]
        with pytest.raises(NoAccess):
            target.encode("a", "b")
    weights = local(folder)
    expected = [weights.decode(new) for new in weights.generate([weights.encode_prompt(p) for p in prompts], 8)]
    assert said == expected and any(said)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_what_is_written_is_kept_character_by_character(text):
    target = EndpointTarget.__new__(EndpointTarget)
    assert target.decode(written(text)) == text


def test_the_wrong_tokenizer_is_found_out(stories, tmp_path):
    """One with the same words in another order; and one with more words than the model has tokens."""
    tokenizer = json.loads((tiny_folder() / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    special = len(tokenizer["added_tokens"])
    turned = {w: i if i < special else special + (i + 1 - special) % (len(words) - special) for w, i in words.items()}
    tokenizer["model"]["vocab"] = turned
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_bytes((tiny_folder() / "tokenizer_config.json").read_bytes())
    for kind in ("vllm", "echo"):
        with ApiServer(tiny_folder(), kind) as server:
            with pytest.raises(BadInput, match="not the tokenizer of the model"):
                probe(Client(endpoint(server, tokenizer=tmp_path)))
            larger = probe(Client(endpoint(server, tokenizer=stories)))
            assert larger.access == Access.TEXT and "not sent to it as ids" in larger.limits[1]


def test_a_server_that_knows_no_such_model_or_key_says_so():
    with ApiServer(tiny_folder()) as server:
        with pytest.raises(BadInput, match="no model named 'other'"):
            probe(Client(Endpoint(server.url, "other", **QUICK)))
        server.fault = lambda n, body: "401"
        with pytest.raises(BadInput, match=f"without a key.*{KEY}"):
            probe(Client(endpoint(server)))
        server.fault = lambda n, body: "redirect"
        with pytest.raises(BadInput, match="elsewhere"):
            probe(Client(endpoint(server)))


def test_an_instrument_is_told_what_is_not_given(tmp_path):
    """vLLM names the 20 likeliest: Min-K++, which needs all, is left out and said to be; the rest stays."""
    folder = tiny_folder()
    with ApiServer(folder) as server:
        case = case_of(endpoint(server, tokenizer=folder), 18, only="membership,trace-logits")
        record = quiet_scan(case, tmp_path / "out")
    assert "membership/loss" in findings(record), record.not_run
    reasons = {row.instrument: row.reason for row in record.not_run}
    assert "membership/min_k_plus_plus" not in findings(record)
    assert "moments" in reasons["membership/min_k_plus_plus"]
    assert "distribution" in reasons["trace-logits"]
    weights = quiet_scan(case_of(folder, 18, only="membership"), tmp_path / "weights")
    shared = [f for f in weights.findings if f.id in findings(record)]
    same(record, weights.model_copy(update={"findings": shared}), 1e-4)


# --- faults -------------------------------------------------------------------------------------------------

PASSING = ("429", "500", "503", "truncated", "cut", "hang", "drip")
WRONG = ("fewer", "gap", "likeliest missing", "NaN", "positive", "text", "another model", "another prompt",
         "no choice", "broken off")  # fmt: skip


@cache
def undisturbed() -> tuple[Record, list[str]]:
    """The audit that nothing happened to, and what it asked for beyond the probe."""
    import tempfile

    folder = tiny_folder()
    with tempfile.TemporaryDirectory() as out, ApiServer(folder) as server:
        record = quiet_scan(case_of(endpoint(server, tokenizer=folder)), Path(out))
        asked = [json.dumps(one) for one in server.asked]
        probed = len(_probed(server, folder))
    return record, asked[probed:]


def _probed(server: ApiServer, folder: Path) -> list[Any]:
    """What a probe alone asks."""
    before = len(server.asked)
    probe(Client(endpoint(server, tokenizer=folder)))
    return server.asked[before:]


def comparable(record: Record) -> dict[str, Any]:
    """The record without what names the server's port."""
    kept = record.comparable()
    for entry in kept["models"].values():
        entry.pop("digest")
    kept["verdict"]["limits"] = [line for line in kept["verdict"]["limits"] if "http://" not in line]
    return kept


def test_the_undisturbed_audit_says_what_the_weights_say(tmp_path):
    record, asked = undisturbed()
    same(record, quiet_scan(case_of(tiny_folder()), tmp_path), 1e-5)
    assert len(asked) == len(set(asked)) + 8, "asked twice: the sample that measures the server's noise, no more"


@pytest.mark.parametrize("fault", [*PASSING, *WRONG])
def test_a_fault_that_passes_changes_nothing_and_one_that_does_not_ends_it(fault):
    """Client and wire alone, on some texts: once wrong, then right; and wrong for ever."""
    folder = tiny_folder()
    sample = [Tokens(tokens.ids, 1) for tokens in texts(folder)[:4]]  # all of it, not only what was learned by heart
    with ApiServer(folder) as server:
        target = opened(endpoint(server, tokenizer=folder))
        server.hold = 0.0 if fault == "429" else 1.0
        target.client.endpoint = replace(target.client.endpoint, timeout=0.15 if fault in ("hang", "drip") else 0.5)
        del target.client.__dict__["_http"]
        asks = [ask for tokens in sample for ask in target.wire.score(tokens)]
        right = [[s.logprob for s in answer] for answer in target.client.ask_all(asks)]
        first = len(server.asked)
        server.fault = lambda n, body: fault if n == first + 1 else ""
        again = [replace(ask, repeat=1) for ask in asks]
        assert [[s.logprob for s in answer] for answer in target.client.ask_all(again)] == right
        assert server.went_wrong[fault] == 1 and len(server.asked) == first + len(asks) + 1
        server.fault = lambda n, body: fault
        target.client.endpoint = replace(target.client.endpoint, retries=1)
        with pytest.raises(Incomplete, match=r"request [0-9a-f]{8}: .+, at the last of 2 attempts"):
            target.client.ask(replace(asks[0], repeat=2))


def test_retry_after_is_waited_for_by_all_and_not_for_ever():
    with ApiServer(tiny_folder()) as server:
        client = Client(endpoint(server))
        probe(client)
        first, server.hold = len(server.asked), 0.4
        server.fault = lambda n, body: "429" if n == first else ""
        wire = Wire(server.name, Capabilities("completions", served=server.name))
        began = time.monotonic()
        client.ask(wire.write("one", 1))
        assert time.monotonic() - began >= 0.4
        client.ask_all([wire.write(f"text {i}", 1) for i in range(4)])
        server.fault, server.hold = (lambda n, body: "429"), 9999
        with pytest.raises(Incomplete, match="asks to wait 9999 s"):
            client.ask(wire.write("two", 1))


def test_requests_keep_to_the_rate():
    with ApiServer(tiny_folder()) as server:
        client = Client(endpoint(server, requests_per_minute=600))
        wire = Wire(server.name, Capabilities("completions", served=server.name))
        began = time.monotonic()
        client.ask_all([wire.write(f"text {i}", 1) for i in range(6)])
        assert time.monotonic() - began >= 0.5, "six requests, a tenth of a second apart"


def test_a_flaky_server_ends_in_the_same_record(tmp_path):
    """Every seventh request goes wrong in another way."""
    folder, kinds = tiny_folder(), ("429", "500", "truncated", "fewer", "NaN", "cut", "likeliest missing")
    with ApiServer(folder) as server:
        server.fault = lambda n, body: kinds[(n // 7) % len(kinds)] if n % 7 == 3 else ""
        record = quiet_scan(case_of(endpoint(server, tokenizer=folder, retries=8)), tmp_path)
        assert sum(count for kind, count in server.went_wrong.items() if kind) >= 5
    assert comparable(record) == comparable(undisturbed()[0])


def test_a_dead_server_ends_as_incomplete_and_the_audit_goes_on_where_it_was(tmp_path):
    """It stops listening in mid-run. The next run asks for what is missing, and for nothing twice."""
    folder, out = tiny_folder(), tmp_path / "out"
    server = ApiServer(folder).start()
    case = case_of(endpoint(server, tokenizer=folder, retries=1))
    probed = len(_probed(server, folder))
    ordered = 2 * probed + 20

    def dies(n: int, body: dict[str, Any]) -> str:
        if n >= ordered:
            threading.Thread(target=server.stop).start()
            return "500"
        return ""

    server.fault = dies
    with pytest.raises(Incomplete, match="what was answered is kept"):
        quiet_scan(case, out)
    assert not (out / "record.json").exists()
    first = [json.dumps(one) for one in server.asked[2 * probed : ordered]]
    kept = sum(1 for _ in out.glob("evidence/answers-*/*/*.json"))
    assert kept >= 16
    server.stop()
    server.fault, before = (lambda n, body: ""), len(server.asked)
    server.start()
    record = quiet_scan(case, out)
    server.stop()
    second = [json.dumps(one) for one in server.asked[before + probed :]]
    everything = undisturbed()[1]
    assert len(second) == len(everything) - kept, "only what was missing"
    assert set(first) | set(second) == set(everything)
    assert comparable(record) == comparable(undisturbed()[0])
    asked = len(server.asked)
    server.start()
    assert comparable(quiet_scan(case, out)) == comparable(record)
    assert len(server.asked) == asked + probed, "a third run asks nothing but what the server is"
    server.stop()


def test_an_answer_that_was_changed_on_disk_is_asked_for_again(tmp_path):
    folder = tiny_folder()
    with ApiServer(folder) as server:
        target = opened(endpoint(server, tokenizer=folder))
        target.client.keep(tmp_path)
        (ask,) = target.wire.score(texts(folder)[0])
        right = target.client.ask(ask)
        (path,) = tmp_path.glob("*/*.json")
        for spoilt in (path.read_text().replace("-0.", "-1."), "{", ""):
            path.write_text(spoilt)
            before = len(server.asked)
            assert target.client.ask(ask) == right and len(server.asked) == before + 1
            assert target.client.ask(ask) == right and len(server.asked) == before + 1


# --- what it costs ------------------------------------------------------------------------------------------


def test_a_budget_stops_before_it_is_exceeded_and_counts_over_runs(tmp_path):
    folder = tiny_folder()
    with ApiServer(folder) as server:
        target = opened(endpoint(server, tokenizer=folder, token_budget=500))
        target.client.keep(tmp_path)
        asks = [replace(ask, repeat=i) for i in range(9) for t in texts(folder) for ask in target.wire.score(t)]
        before = len(server.asked)
        probing = sum(target.client.used)
        with pytest.raises(Incomplete, match="token_budget 500 would be exceeded"):
            target.client.ask_all(asks)
        sent = probing + sum(len(body["prompt"]) + 1 for _, body in server.asked[before:])
        assert 450 < sent == sum(target.client.used) <= 500
        again = Client(target.client.endpoint)
        again.keep(tmp_path)
        assert sum(again.used) == sent
        with pytest.raises(Incomplete, match="token_budget"):
            again.ask_all(asks)
        with pytest.raises(Incomplete, match=r"cost_budget 0\.001 would be exceeded"):
            priced = replace(target.client.endpoint, token_budget=0, cost_budget=0.001, input_price=10.0)
            Client(priced).ask_all(asks)


def test_the_cost_is_said_before_the_start(monkeypatch, capsys, tmp_path):
    """And a budget that the prompts alone exceed stops before the first of them; exit 4. No key anywhere."""
    monkeypatch.setenv(KEY, SECRET)
    folder, sets = tiny_folder(), build_tiny().sets
    words = [w for name in ("forget", "retain", "holdout") for w in (f"--{name}", f"{sets[name]}?limit=6")]
    with ApiServer(folder) as server:
        flags = ["--endpoint", server.url, "--model", server.name, "--tokenizer", folder, "--template", "plain"]
        rest = [*words, "--only", "memorization", "--budget", "quick", "--fail-on", "never", "--out", tmp_path / "out"]
        assert audit_here(monkeypatch, "scan", *flags, *rest, "--token-budget", 40) == 4
        shown = capsys.readouterr()
        assert "token_budget 40" in shown.err
        before = len(server.asked)
        assert audit_here(monkeypatch, "scan", *flags, *rest) == 0
        shown_too = capsys.readouterr()
        assert "requests, about" in shown_too.err and "tokens of" in shown_too.err
        assert len(server.asked) > before
        assert all(header["Authorization"] == f"Bearer {SECRET}" for header in server.headers)
        server.fault = lambda n, body: "key"
        assert audit_here(monkeypatch, "scan", *flags, *rest[:-1], tmp_path / "echoed") == 4
        shown_last = capsys.readouterr()
    assert "repeats the key" in shown_last.err
    assert not any(SECRET in text for s in (shown, shown_too, shown_last) for text in s)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert audit_here(monkeypatch, "scan", folder, *flags, *rest) == 2
    assert audit_here(monkeypatch, "scan", *flags, *rest, "--spike") == 2
