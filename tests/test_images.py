"""Images: what the readers make of every format, and the shared engine against each classifier's own forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images import CLASSES, KINDS, SIDE, save_classifier, save_images
from PIL import Image

from audit.capture import Engine
from audit.case import Case, Options
from audit.errors import BadInput, Refused
from audit.image_target import ImageTarget
from audit.inventory import take_inventory
from audit.loaders import SetSpec, load_set, parse_set_spec
from audit.pictures import picture, png
from audit.plan import Request, merge
from audit.quantities import MOMENTS, TOKEN, hidden
from audit.scan import scan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    return {kind: save_classifier(root / kind, kind) for kind in KINDS}


def opened(folder, role="target"):
    return ImageTarget(role, take_inventory(folder))


# --- readers --------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_examples(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
    names = [CLASSES[i % 2] for i in range(6)]
    np.savez(tmp_path / "a.npz", X=pixels, y=np.array(names))
    for i, (image, name) in enumerate(zip(pixels, names, strict=True)):
        (tmp_path / "folder" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folder" / name / f"{i}.png")
    import pyarrow
    import pyarrow.parquet

    data = [{"bytes": (tmp_path / "folder" / n / f"{i}.png").read_bytes(), "path": None} for i, n in enumerate(names)]
    pyarrow.parquet.write_table(pyarrow.table({"image": data, "label": names}), tmp_path / "a.parquet")
    read = {name: load_set("forget", SetSpec(tmp_path / name)) for name in ("a.npz", "a.parquet", "folder")}
    assert read["a.npz"].digest == read["a.parquet"].digest
    for rows in read.values():
        assert [(r.answer, r.picture.digest) for r in sorted(rows, key=lambda r: r.picture.digest)] == [
            (r.answer, r.picture.digest) for r in sorted(read["a.npz"], key=lambda r: r.picture.digest)
        ]
    assert (read["a.npz"].examples[3].picture.pixels == pixels[3]).all()
    chosen = load_set("forget", parse_set_spec(f"{tmp_path / 'a.npz'}?label=one&limit=2"))
    assert [row.answer for row in chosen] == ["one", "one"]


def test_splits_and_class_names_of_an_npz(tmp_path):
    pixels = np.zeros((4, 2, 2), np.uint8)
    np.savez(
        tmp_path / "a.npz", Xtrain=pixels, ytrain=[0, 1, 1, 0], Xtest=pixels[:1], ytest=[1], classes=["cat", "dog"]
    )
    assert [r.answer for r in load_set("retain", parse_set_spec(f"{tmp_path / 'a.npz'}?split=test"))] == ["dog"]
    assert [r.answer for r in load_set("retain", parse_set_spec(f"{tmp_path / 'a.npz'}?split=train"))][:2] == [
        "cat",
        "dog",
    ]


def test_grey_images_and_odd_arrays():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert (picture(grey).pixels == np.stack([grey] * 3, axis=-1)).all()
    assert picture(grey) == picture(grey.astype(float)) and picture(grey) != picture(grey.T)
    assert png(picture(grey))[:8] == b"\x89PNG\r\n\x1a\n"
    for odd in (grey + 0.5, grey.astype(int) + 300, np.zeros((2, 2, 5)), np.zeros((0, 2)), np.zeros(3)):
        with pytest.raises(ValueError, match="image"):
            picture(odd)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: np.savez(p / "a.npz", Z=np.zeros((1, 2, 2))), r"a\.npz: no arrays X and y"),
        (lambda p: np.savez(p / "a.npz", X=np.zeros((2, 2, 2)), y=[1]), r"a\.npz: X has 2 images"),
        (lambda p: np.savez(p / "a.npz", X=np.full((1, 2, 2), 0.5), y=[1]), r"a\.npz: X\[0\]: an image of float64"),
        (lambda p: np.savez(p / "a.npz", X=np.array([None]), y=[1]), r"a\.npz: not a readable \.npz"),
        (lambda p: (p / "a.npz").write_bytes(b"PK"), r"a\.npz: not a readable \.npz"),
    ],
)
def test_bad_files_of_images_are_named(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(BadInput, match=message):
        load_set("forget", SetSpec(tmp_path / "a.npz"))


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(BadInput, match=r"cat/1\.png: not a readable image"):
        load_set("forget", SetSpec(tmp_path))


# --- the engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_records_what_the_model_computes(kind, folders, tmp_path):
    target = opened(folders[kind])
    rows = load_set("forget", SetSpec(save_images(tmp_path / "a.npz")))
    shown = tuple(target.show(row) for row in rows)
    sites = [f"blocks.{i}.hook_resid_post" for i in range(target.layers)]
    widest = sites[-1]
    whole = tuple(target.show(row, parts=target.parts(widest)) for row in rows)
    requests = [
        Request("decision", shown, (TOKEN, MOMENTS, *(hidden(site) for site in sites))),
        Request("parts", whole, (hidden(widest),)),
    ]
    engine = Engine(target, token_budget=80)  # five images a batch
    found = {row.tokens.key: row.values for batch in engine.batches(merge(requests)) for row in engine.run(batch)}
    assert engine.forward_tokens == len(rows)  # each image passes once, whatever is asked of it
    with torch.inference_mode():
        pixels = target.pixels([row.picture.pixels for row in rows])
        output = target.model(pixel_values=pixels, output_hidden_states=True)
    truth = output.logits.log_softmax(-1)
    for i, (row, tokens) in enumerate(zip(rows, shown, strict=True)):
        label = CLASSES.index(row.answer)
        values = found[tokens.key]
        assert values["token"]["logprob"] == pytest.approx([float(truth[i, label])], abs=1e-5)
        assert values["token"]["match"].tolist() == [int(truth[i].argmax()) == label]
        assert -values["moments"]["mean"][0] == pytest.approx(-float((truth[i].exp() * truth[i]).sum()), abs=1e-5)
    last = output.hidden_states[-1]
    if last.ndim == 4:
        last = last.flatten(2).transpose(1, 2)
    if kind in ("vit", "deit"):
        assert target.parts(widest) == (SIDE // 4) ** 2 + (kind == "deit")  # its distillation token
    elif kind != "swin":  # whose last hidden state is normed
        states = np.stack([found[tokens.key][hidden(widest).name]["hidden"][:, 0] for tokens in whole])
        np.testing.assert_allclose(states[:, 1:], last, atol=1e-5)
        np.testing.assert_allclose(states[:, 0], last.mean(1), atol=1e-5)
    one = engine.plain(shown[0])
    assert one["logprob"] == pytest.approx(found[shown[0].key]["token"]["logprob"], abs=1e-5)


def test_states_of_a_vision_transformer_are_its_own(folders, tmp_path):
    target = opened(folders["vit"])
    rows = load_set("forget", SetSpec(save_images(tmp_path / "a.npz")))
    site = "blocks.1.hook_resid_post"
    whole = tuple(target.show(row, parts=target.parts(site)) for row in rows)
    engine = Engine(target)
    [batch] = engine.batches(merge([Request("parts", whole, (hidden(site),))]))
    states = np.stack([row.values[hidden(site).name]["hidden"][:, 0] for row in engine.run(batch)])
    order = [list(whole).index(work.tokens) for work in batch.works]
    with torch.inference_mode():
        pixels = target.pixels([rows.examples[i].picture.pixels for i in order])
        truth = target.model(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
    np.testing.assert_allclose(states, truth, atol=1e-5)


def test_what_cannot_be_asked(folders, tmp_path):
    target = opened(folders["vit"])
    rows = load_set("forget", SetSpec(save_images(tmp_path / "a.npz")))
    assert [target.label(name) for name in (*CLASSES, "2")] == [0, 1, 2, 3, 2]
    with pytest.raises(BadInput, match="no class 'seven'; its classes: zero, one, two, three"):
        target.label("seven")
    for place in ("blocks.3.hook_resid_post", "blocks.0.hook_mlp_out", "embed"):
        with pytest.raises(BadInput, match="no place named"):
            target.site(place)
    odd = Request("odd", (target.show(rows.examples[0], parts=3),), (hidden("blocks.0.hook_resid_post"),))
    engine = Engine(target)
    with pytest.raises(ValueError, match=r"3 parts wanted at blocks\.0\.hook_resid_post, not 16"):
        engine.run(engine.batches(merge([odd]))[0])
    with pytest.raises(BadInput, match="writes no text"):
        engine.generate([(1, 2)], 3)
    (folders["vit"].parent / "odd").mkdir()
    from transformers import BeitConfig, BeitForImageClassification

    small = BeitConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16)
    BeitForImageClassification(small).save_pretrained(folders["vit"].parent / "odd")
    with pytest.raises(Refused, match="image classifiers of type 'beit'"):
        opened(folders["vit"].parent / "odd")


def test_models_and_sets_must_be_of_one_kind(folders, tiny, tmp_path):
    images = SetSpec(save_images(tmp_path / "a.npz"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a", "answer": "b"}\n')
    options = Options(device="cpu")
    with pytest.raises(BadInput, match="set 'forget' holds images, set 'retain' does not"):
        Case.build({"target": folders["vit"]}, {"forget": images, "retain": SetSpec(texts)}, options)
    for folder, spec in ((tiny("llama"), images), (folders["vit"], SetSpec(texts))):
        with pytest.raises(BadInput, match="does not fit the sets"):
            scan(Case.build({"target": folder}, {"forget": spec}, options), tmp_path / "out")
