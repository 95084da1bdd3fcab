"""What an auditor lets pass: the refusal names the very words, the record names the exception, and nothing loads it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import hostile
import pytest
from hostile import FOLDERS, WEIGHTS, Folder, put, sound
from worlds import build_tiny, quiet_scan, tiny_case

import audit.opened
import cli
from audit.allowed import ASIDE
from audit.errors import BadInput, Refused
from audit.inventory import Inventory, take_inventory
from audit.target import Target

HOSTILE = [row for row in FOLDERS if row.words]
CAN_PASS = {
    "pickle": {"pickle"},
    "disguise": {"pickle"},
    "archive": {"pickle", "archive"},
    "program": {"program", "pickle"},
    "configuration": {"auto_map"},
    "tokenizer": {"ids"},
    "files": {"hard-link"},
}
"""By family of hostile folders, so that a new exception is a decision and not an accident."""


def label(row: Folder) -> str:
    return f"{row.family}: {row.name}".encode("ascii", "backslashreplace").decode()


def let_pass(folder: Path) -> Inventory:
    """The inventory with every exception that the refusals name, one after the other, as an auditor would."""
    names: list[str] = []
    while True:
        try:
            return take_inventory(folder, allow=names)
        except Refused as error:
            said = str(error).partition(", or pass ")[2]
            if not said:
                raise
            flag, name = shlex.split(said)
            assert flag == "--allow" and name not in names
            names.append(name)


@pytest.mark.parametrize("row", HOSTILE, ids=label)
def test_the_words_that_a_refusal_names_are_all_it_takes(tmp_path, row):
    """Whatever can be let pass is hashed and no part of the model; whatever can do harm is refused all the same."""
    folder, canary = sound(tmp_path / "sound"), tmp_path / "canary"
    row.make(folder, canary)
    try:
        found = let_pass(folder)
    except Refused as error:
        assert "--allow" not in str(error)
        harmless = row.family in ("pickle", "archive", "program") and row.file not in (WEIGHTS, "vocab.txt")
        assert not harmless, "a file that nothing loads can be set aside"
        return
    finally:
        assert not canary.exists()
    files, codes = zip(*(name.rpartition(":")[::2] for name in found.allowed), strict=True)
    assert set(codes) <= CAN_PASS.get(row.family, set())
    assert set(files) <= {entry.path for entry in found.files}, "hashed as everything is"
    assert found.aside == {file for file, code in zip(files, codes, strict=True) if code in ASIDE}
    assert not found.aside & {*found.weight_files, *found.tokenizer_files, "config.json"}
    assert len(found.limits) == len(found.allowed)


@pytest.mark.parametrize("name", ["a.sh", ":program", "a.sh:", "a.sh:virus", "config.json:link", ""])
def test_an_exception_is_a_file_and_a_reason(tmp_path, name):
    with pytest.raises(BadInput, match="write FILE:REASON, where REASON is one of pickle, archive"):
        take_inventory(sound(tmp_path / "sound"), allow=[name])


def test_an_exception_is_for_one_file_and_one_reason(tmp_path):
    folder = sound(tmp_path / "sound")
    for name in ("a.sh", "sub/a.sh"):
        put(name, hostile.shell)(folder, tmp_path / "canary")
    with pytest.raises(Refused, match=r"/sub/a\.sh: custom code.*--allow sub/a\.sh:program$"):
        take_inventory(folder, allow=["a.sh:program"])
    with pytest.raises(Refused, match=r"/a\.sh: custom code"):
        take_inventory(folder, allow=["a.sh:pickle", "a.sh:archive", "sub/a.sh:program"])
    assert take_inventory(folder, allow=["a.sh:program", "sub/a.sh:program", "gone:pickle"]).limits == [
        "allowed by the auditor: a.sh:program, hashed, but never opened",
        "allowed by the auditor: sub/a.sh:program, hashed, but never opened",
    ]


def test_a_name_with_spaces_is_quoted_for_the_shell(tmp_path):
    folder = sound(tmp_path / "sound")
    put("my; rm 'it'.sh", hostile.shell)(folder, tmp_path / "canary")
    assert let_pass(folder).aside == {"my; rm 'it'.sh"}


# --- what is let pass is not loaded


ASIDE_FILES = {
    "training_args.bin": hostile.packed(hostile.zipped),
    "optimizer.pt": hostile.bomb(),
    "pytorch_model.bin": hostile.packed(hostile.zipped),
    "notes.tar": hostile.packed(hostile.tarred("../../evil.py")),
    "install.sh": hostile.shell,
    "modeling_llama.py": hostile.python,
    "configuration_llama.py": hostile.python,
    "sub/kernel.py": hostile.python,
}


def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A trained model with all of these beside it, and its canary."""
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(build_tiny().models["original"], folder)
    for name, content in ASIDE_FILES.items():
        put(name, content)(folder, canary)
    return folder, canary


def add(path: Path, **more: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_a_scan_with_exceptions(tmp_path, monkeypatch, capsys):
    """By the command line: the record lists each exception and hashes its file, and nothing was run or opened."""
    folder, canary = planted(tmp_path)
    add(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.Evil"})
    opened: list[str] = []
    load = audit.opened.OpenModel._load

    def watched(self, factory, **options):
        opened.extend(str(path.relative_to(self._view.name)) for path in Path(self._view.name).rglob("*"))
        return load(self, factory, **options)

    monkeypatch.setattr(audit.opened.OpenModel, "_load", watched)
    kinds = {".bin": "pickle", ".pt": "pickle", ".tar": "archive", ".sh": "program", ".py": "program"}
    allow = [f"{name}:{kinds[Path(name).suffix]}" for name in ASIDE_FILES] + ["config.json:auto_map"]
    words = ["scan", str(folder), "--only", "memorization", "--template", "plain", "--out", str(tmp_path / "out")]
    words += [word for name in ("forget", "retain", "holdout") for word in (f"--{name}", str(build_tiny().sets[name]))]
    words += ["--json", "--fail-on", "never", "--budget", "quick", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["audit", *words, *(word for name in allow for word in ("--allow", name))])
    with pytest.raises(SystemExit) as left:
        cli.main()
    record = json.loads(capsys.readouterr().out)
    assert left.value.code == 0 and not canary.exists()
    limits = [limit for limit in record["verdict"]["limits"] if "allowed" in limit]
    assert sorted(re.findall(r"auditor: (\S+),", " ".join(limits))) == sorted(allow)
    assert all(limit.startswith("target: allowed by the auditor: ") for limit in limits)
    assert ASIDE_FILES.keys() <= {file["path"] for file in record["models"]["target"]["files"]}
    assert record["case"]["options"]["allow"] == ",".join(allow)
    assert "config.json" in opened and not ASIDE_FILES.keys() & set(opened)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_code_of_the_folder_is_never_run(tmp_path, file, known):
    """With a type that transformers knows, and with one that only the folder's code defines."""
    folder, canary = planted(tmp_path)
    names = {f"Auto{kind}": "modeling_llama.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
    names["AutoTokenizer"] = ["modeling_llama.Evil", "modeling_llama.Evil"]
    add(folder / file, auto_map=names)
    if not known:
        add(folder / "config.json", model_type="evil", architectures=["EvilForCausalLM"])
    inventory = let_pass(folder)
    assert f"{file}:auto_map" in inventory.allowed
    if known and file != "tokenizer_config.json":
        assert Target("target", inventory).model.config.model_type == "llama"
    else:
        try:
            assert Target("target", inventory).model is not None
        except Refused as error:
            assert "palimpsest-" not in str(error), "the folder is named, not the links to it"
    assert not canary.exists()


def test_what_comes_after_the_inventory_is_not_seen(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(build_tiny().models["original"], folder)
    inventory = take_inventory(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    assert Target("target", inventory, template="plain").model is not None


# --- hard links, and tokens without a row


def test_a_hard_link_is_loaded_and_watched(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(build_tiny().models["original"], tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", folder, copy_function=os.link)
    with pytest.raises(Refused, match=r"hard link.*--allow config\.json:hard-link"):
        take_inventory(folder)
    inventory = let_pass(folder)
    assert {name.rpartition(":")[2] for name in inventory.allowed} == {"hard-link"}
    assert Target("target", inventory, template="plain").model is not None and not inventory.aside


@pytest.fixture
def padded(tmp_path) -> Path:
    """A model with a padding token that it has no row for, as some fine-tuned models have."""
    folder = tmp_path / "model"
    shutil.copytree(build_tiny().models["original"], folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": rows, "content": "[PAD]", **flags})
    path.write_text(json.dumps(tokenizer))
    add(folder / "tokenizer_config.json", pad_token="[PAD]")
    return folder


def test_a_padding_token_without_a_row(tmp_path, padded):
    with pytest.raises(Refused, match=r"beyond the vocab_size.*--allow tokenizer\.json:ids"):
        take_inventory(padded)
    target = Target("target", let_pass(padded), template="plain")
    assert target.tokenizer.pad_token_id == target.vocabulary
    assert target.padding_id < target.vocabulary
    with pytest.raises(BadInput, match=r"no row for the token '\[PAD\]'"):
        target.encode("Who [PAD]", "she")
    plain = Target("target", take_inventory(build_tiny().models["original"]), template="plain")
    prompts = [target.encode_prompt(text) for text in ("Who is", "Where was the one who")]
    said = [[each.decode(ids) for ids in each.generate(prompts, 4)] for each in (target, plain)]
    assert said[0] == said[1], "padded with another token, masked out as ever"


# --- what changes between inventory and load


def test_a_file_that_changes_before_it_is_loaded(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(build_tiny().models["original"], folder)
    target = Target("target", take_inventory(folder), template="plain")
    path = folder / WEIGHTS
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Refused, match=rf"{WEIGHTS}: changed while it was read; audit a copy that nobody else writes"):
        _ = target.model


def test_a_file_that_changes_during_a_scan(tmp_path):
    """Read again after it was checked on loading: noticed before a record is written."""
    folder = tmp_path / "model"
    shutil.copytree(build_tiny().models["original"], folder)
    case = tiny_case({"target": "original"}, ("forget", "retain", "holdout"), only="memorization")
    case.models["target"] = folder  # type: ignore[index]

    class Changing(Target):
        def release(self) -> None:
            super().release()
            (folder / "config.json").touch()

    with pytest.raises(Refused, match=r"config\.json: changed while it was read"):
        quiet_scan(case, tmp_path / "out", open_target=Changing)
    assert not (tmp_path / "out" / "record.json").exists()
