"""Evidence: what was written is read back, whole blocks or none, and never to the wrong model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.errors import Unwritable
from audit.evidence import Evidence, Store, context_of
from audit.plan import Generate, Request
from audit.quantities import MOMENTS, TOKEN, Quantity, hidden, top_k
from audit.tokens import Tokens

CONTEXT = {"model": "a" * 64, "dtype": "torch.float32", "device": "cpu", "torch": "2", "transformers": "5"}
STATES = hidden("hook_embed", "blocks.0.hook_resid_post")


def values(tokens: Tokens, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Arrays as the engine gives them, of every shape and type."""
    random, n = np.random.default_rng([seed, *tokens.ids]), tokens.scored
    return {
        "token": {"logprob": random.normal(size=n).astype(np.float32), "match": random.random(n) < 0.5},
        "top-3": {"top_ids": random.integers(0, 99, (n, 3)), "top_logprobs": random.random((n, 3), np.float32)},
        STATES.name: {"hidden": random.normal(size=(n, 2, 4)).astype(np.float32)},
    }


def texts(count: int, length: int = 6) -> list[Tokens]:
    return [Tokens((i, *range(1, length + i % 3)), 1 + i % 4) for i in range(count)]


def equal(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        assert np.array_equal(found[key], array)


def filled(root, blocks: int = 2) -> tuple[Store, list[list[Tokens]]]:
    """A store of a few blocks of three texts each."""
    store = Store(root, CONTEXT)
    batches = [texts(3 * blocks)[i : i + 3] for i in range(0, 3 * blocks, 3)]
    for batch in batches:
        store.write((tokens, values(tokens)) for tokens in batch)
    return store, batches


def all_of(batches: list[list[Tokens]]) -> list[Tokens]:
    return [tokens for batch in batches for tokens in batch]


# --- rows


def test_round_trip_in_memory_and_from_disk(tmp_path):
    store, batches = filled(tmp_path)
    for reader in (store, Store(tmp_path, CONTEXT)):
        assert not reader.damaged
        for tokens in all_of(batches):
            for quantity, expected in values(tokens).items():
                equal(reader.read(tokens, quantity), expected)
            assert all(reader.knows(tokens, q) for q in (TOKEN, top_k(3), STATES))
            assert not reader.knows(tokens, MOMENTS)
            with pytest.raises(KeyError):
                reader.read(tokens, "moments")
        assert not reader.knows(Tokens((99, 98), 1), TOKEN)
        assert not reader.knows(Tokens(batches[0][0].ids, 5, (1,)), TOKEN)  # rivals make it another text
    assert len(list(store.folder.iterdir())) == 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=12))
def test_any_rows_in_any_mixture_of_quantities(tmp_path_factory, shape):
    root = tmp_path_factory.mktemp("evidence")
    rows = []
    for i, (length, start, kept) in enumerate(shape):
        tokens = Tokens((i, *range(length)), min(start, length))
        rows.append((tokens, dict(list(values(tokens).items())[:kept])))
    if not any(kept for _, kept in rows):
        return
    Store(root, CONTEXT).write(rows)
    store = Store(root, CONTEXT)
    for tokens, kept in rows:
        for quantity in (TOKEN, top_k(3), STATES):
            assert store.knows(tokens, quantity) == (quantity.name in kept)
        for quantity, expected in kept.items():
            equal(store.read(tokens, quantity), expected)


def test_a_later_start_is_a_slice_and_an_earlier_one_is_unknown(tmp_path):
    ids = (5, 6, 7, 8, 9, 10)
    stored = Tokens(ids, 3)
    store = Store(tmp_path, CONTEXT)
    store.write([(Tokens((1, 2), 1), values(Tokens((1, 2), 1))), (stored, values(stored))])
    for reader in (store, Store(tmp_path, CONTEXT)):
        for start in (3, 4, 5):
            tokens = Tokens(ids, start)
            assert reader.knows(tokens, TOKEN)
            for quantity, arrays in values(stored).items():
                equal(reader.read(tokens, quantity), {key: array[start - 3 :] for key, array in arrays.items()})
        assert not reader.knows(Tokens(ids, 2), TOKEN)
        assert not reader.knows(Tokens(ids, 1), TOKEN)
    wider = Tokens(ids, 1)
    store.write([(wider, values(wider, seed=1))])
    for reader in (store, Store(tmp_path, CONTEXT)):  # whichever block is read first
        assert reader.knows(wider, TOKEN)
        equal(reader.read(wider, "token"), values(wider, seed=1)["token"])
        equal(reader.read(Tokens(ids, 4), "token"), {k: a[3:] for k, a in values(wider, seed=1)["token"].items()})


def test_more_blocks_than_are_kept_in_memory(tmp_path, monkeypatch):
    store, batches = filled(tmp_path, blocks=6)
    [size] = {sum(a.nbytes for t in batch for a in values(t)["token"].values()) for batch in batches[:1]}
    monkeypatch.setattr("audit.evidence._MOST_IN_MEMORY", 2 * size)
    for tokens in all_of(batches) + all_of(batches)[::-1]:
        equal(store.read(tokens, "token"), values(tokens)["token"])
    held = sum(a.nbytes for block in store._cache.values() for arrays in block.values() for a in arrays.values())
    assert store._held == held <= 2 * size or len(store._cache) == 1


def test_the_same_batch_is_the_same_block(tmp_path):
    store, [batch] = filled(tmp_path, blocks=1)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    for _ in range(20):
        Store(tmp_path, CONTEXT).write((tokens, values(tokens)) for tokens in batch)
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before


def test_names_with_a_slash_stay_apart(tmp_path):
    store = Store(tmp_path, CONTEXT)
    tokens = Tokens((1, 2, 3), 1)
    store.write([(tokens, {"a": {"x": np.zeros(2)}, "a/b": {"y": np.ones(2)}})])
    equal(store.read(tokens, "a"), {"x": np.zeros(2)})


# --- continuations


def test_continuations_round_trip(tmp_path):
    pairs = [((1, 2, 3), (7, 8)), ((4,), ()), ((5, 6), (9, 9, 9, 2, 0))]
    Store(tmp_path, CONTEXT).write_continuations(pairs, 5)
    store = Store(tmp_path, CONTEXT)
    for prompt, new in pairs:
        assert store.knows_continuation(prompt, 5)
        assert store.read_continuation(prompt, 5) == new
        assert not store.knows_continuation(prompt, 6)
        assert not store.knows_continuation((*prompt, 1), 5)
    assert not Store(tmp_path, {**CONTEXT, "model": "b" * 64}).knows_continuation((4,), 5)


def test_continuations_and_scores_of_the_same_ids_are_apart(tmp_path):
    store = Store(tmp_path, CONTEXT)
    tokens = Tokens((1, 2, 3), 1)
    store.write_continuations([(tokens.ids, (7,))], 5)
    assert not store.knows(tokens, TOKEN)
    store.write([(tokens, values(tokens))])
    equal(store.read(tokens, "token"), values(tokens)["token"])
    assert store.read_continuation(tokens.ids, 5) == (7,)


# --- damage


def test_what_a_killed_write_left_is_ignored(tmp_path):
    store, batches = filled(tmp_path)
    [first, *_] = sorted(store.folder.glob("*.safetensors"))
    data = first.read_bytes()
    first.rename(first.with_name(f".{first.name}.123.tmp"))  # all but renamed
    (store.folder / ".half.safetensors.124.tmp").write_bytes(data[: len(data) // 2])
    again = Store(tmp_path, CONTEXT)
    assert not again.damaged
    assert sorted(again.knows(batch[0], TOKEN) for batch in batches) == [False, True]
    for batch in batches:
        again.write((tokens, values(tokens)) for tokens in batch)
    assert all(Store(tmp_path, CONTEXT).knows(tokens, TOKEN) for tokens in all_of(batches))


def test_a_write_that_fails_leaves_no_block(tmp_path, monkeypatch):
    store, _ = filled(tmp_path, blocks=1)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    tokens = Tokens((50, 51), 1)
    with pytest.raises(Unwritable, match=r"safetensors: cannot be written: disk full"):
        store.write([(tokens, values(tokens))])
    assert not store.knows(tokens, TOKEN)
    monkeypatch.undo()
    again = Store(tmp_path, CONTEXT)
    assert not again.damaged
    assert not again.knows(tokens, TOKEN)


@pytest.mark.parametrize("where", ["length", "header", "data", "end", "cut", "empty", "longer"])
def test_a_damaged_block_is_set_aside_and_the_others_served(where, tmp_path):
    store, batches = filled(tmp_path, blocks=3)
    victim = store._places[batches[1][0].key, "token"].block
    data = bytearray(victim.read_bytes())
    if where in ("length", "header", "data", "end"):
        data[{"length": 0, "header": 20, "data": len(data) // 2 + 300, "end": -1}[where]] ^= 1
    else:
        data = {"cut": data[:-5], "empty": bytearray(), "longer": data + b"x"}[where]
    victim.write_bytes(data)
    again = Store(tmp_path, CONTEXT)
    assert again.damaged == [victim.name]
    assert not victim.exists()
    assert victim.with_suffix(".damaged").read_bytes() == data
    for i, batch in enumerate(batches):
        for tokens in batch:
            assert again.knows(tokens, TOKEN) == (i != 1)
            if i != 1:
                equal(again.read(tokens, "token"), values(tokens)["token"])
    again.write((tokens, values(tokens)) for tokens in batches[1])  # computed again, under its old name
    healed = Store(tmp_path, CONTEXT)
    assert not healed.damaged
    assert all(healed.knows(tokens, TOKEN) for tokens in all_of(batches))


# --- contexts


def test_a_store_of_another_context_serves_nothing(tmp_path):
    _, batches = filled(tmp_path)
    for key in CONTEXT:
        other = Store(tmp_path, {**CONTEXT, key: "other"})
        assert other.folder != Store(tmp_path, CONTEXT).folder
        assert not any(other.knows(tokens, TOKEN) for tokens in all_of(batches))
    # Nor do the names of the parts run together.
    assert Store(tmp_path, {"a": "b", "c": "d"}).folder != Store(tmp_path, {"a": 'b", "c": "d'}).folder
    same = Store(tmp_path, dict(reversed(CONTEXT.items())))
    assert same.knows(batches[0][0], TOKEN)


def test_a_block_carried_into_another_contexts_folder_is_not_served(tmp_path):
    store, batches = filled(tmp_path, blocks=1)
    other = Store(tmp_path, {**CONTEXT, "model": "b" * 64})
    shutil.copytree(store.folder, other.folder)
    assert not Store(tmp_path, {**CONTEXT, "model": "b" * 64}).knows(batches[0][0], TOKEN)


def test_what_the_context_holds():
    context = context_of("d1", dtype="torch.float32", device="cpu")
    assert context != context_of("d2", dtype="torch.float32", device="cpu")
    assert context != context_of("d1", dtype="torch.bfloat16", device="cpu")
    assert context != context_of("d1", dtype="torch.float32", device="cuda")
    assert context_of("d", dtype="x", device="cuda:0") == context_of("d", dtype="x", device="cuda:1")
    assert {"model", "dtype", "device", "torch", "transformers"} <= context.keys()


def test_a_block_carries_its_context(tmp_path):
    store, _ = filled(tmp_path, blocks=1)
    [block] = store.folder.iterdir()
    data = block.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert CONTEXT["model"] in json.dumps(header["__metadata__"])


# --- notes


def test_notes(tmp_path):
    store = Store(tmp_path, CONTEXT)
    assert store.note("noise") is None
    store.write_note("noise", 1.25e-6)
    assert Store(tmp_path, CONTEXT).note("noise") == 1.25e-6
    assert Store(tmp_path, {**CONTEXT, "dtype": "x"}).note("noise") is None


@pytest.mark.parametrize("data", [b"", b"\x00\x00", b"{}"])
def test_a_damaged_note_is_unknown(data, tmp_path):
    store = Store(tmp_path, CONTEXT)
    store.write_note("noise", 1.0)
    (store.folder / "noise.json").write_bytes(data)
    assert Store(tmp_path, CONTEXT).note("noise") is None


# --- what instruments read


def test_evidence_answers_by_role_and_name_in_the_order_of_the_request(tmp_path):
    store, batches = filled(tmp_path)
    other = Store(tmp_path, {**CONTEXT, "model": "b" * 64})
    asked = tuple(all_of(batches)[::-1])
    other.write((tokens, values(tokens, seed=9)) for tokens in asked)
    evidence = Evidence()
    request = Request("answer", asked, (TOKEN, top_k(3)), {"rows": [1, 2]})
    evidence.register("target", store, [request, Generate("written", ((1,),), 4)])
    evidence.register("original", other, [request])
    evidence.add_texts("target", "written", ["a text"])
    assert evidence.roles == ["target", "original"]
    assert evidence.has("target", "answer")
    assert not evidence.has("retrained", "answer")
    assert evidence.sequences("target", "answer") == asked
    assert evidence.extra("target", "answer") == {"rows": [1, 2]}
    assert evidence.texts("target", "written") == ["a text"]
    for role, seed in (("target", 0), ("original", 9)):
        for tokens, row in zip(asked, evidence.scores(role, "answer"), strict=True):
            equal(row, values(tokens, seed)["token"] | values(tokens, seed)["top-3"])
        for tokens, row in zip(asked, evidence.iterate(role, "answer", "token"), strict=True):
            equal(row, values(tokens, seed)["token"])
    for missing in (("retrained", "answer"), ("target", "other")):
        with pytest.raises(KeyError):
            evidence.scores(*missing)


def test_two_instruments_that_ask_the_same_get_both_their_quantities(tmp_path):
    store, batches = filled(tmp_path)
    asked = tuple(batches[0])
    evidence = Evidence()
    first = Request("answer", asked, (TOKEN,), {"a": 1})
    second = Request("answer", asked, (top_k(3), Quantity("token", lambda _: {})), {"b": 2})
    evidence.register("target", store, [first, second])
    assert evidence.extra("target", "answer") == {"a": 1, "b": 2}
    for tokens, row in zip(asked, evidence.scores("target", "answer"), strict=True):
        equal(row, values(tokens)["token"] | values(tokens)["top-3"])


def test_two_requests_of_one_name_for_other_texts_are_refused(tmp_path):
    store, batches = filled(tmp_path)
    requests = [Request("answer", tuple(batch)) for batch in batches]
    with pytest.raises(ValueError, match="answer"):
        Evidence().register("target", store, requests)
