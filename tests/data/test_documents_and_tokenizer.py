"""Reading documents, the shipped corpus and the tokenizer trained on it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from refine_mcore.data import load_tokenizer, read_documents, tokenizer_file
from refine_mcore.errors import UserError

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "examples/data/public_domain.jsonl"
MODEL = ROOT / "examples/data/tokenizer.model"


def test_reads_files_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 3}\n\n{"text": "zwei ü\\n"}\n')
    (tmp_path / "b.txt").write_text("three\nlines\r\n\n", encoding="utf-8", newline="")
    documents = list(read_documents([tmp_path / "a.jsonl", str(tmp_path / "b.txt")]))
    assert [document.text for document in documents] == ["one", "zwei ü\n", "three\nlines\r\n\n"]
    origins = [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.txt"]
    assert [document.origin for document in documents] == origins


def test_a_byte_order_mark_and_characters_of_two_halves_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\\ud83d\\ude00 \\\\ud800"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    documents = read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    assert [document.text for document in documents] == ["\U0001f600 \\ud800", "three"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ":2: the line is not valid JSON in UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', ":1: the line is not valid JSON in UTF-8"),
        ("a.jsonl", b"[" * 100_000 + b"]" * 100_000, ":1: the line is not valid JSON in UTF-8"),
        ("a.jsonl", b'{"text": "a\\uD800b"}\n', r":1: a string holds \ud800, half of a character"),
        ("a.jsonl", b'{"content": "x"}\n', ":1: the line is not an object with a string field"),
        ("a.jsonl", b'{"text": ["x"]}\n', ":1: the line is not an object with a string field"),
        ("a.jsonl", b'"text"\n', ":1: the line is not an object with a string field 'text'"),
        ("a.jsonl", b"\n\n", ": holds no documents"),
        ("a.txt", b"abc\xff", ": not UTF-8 text (byte 3)"),
        ("a.txt", b" \n", ": holds no documents"),
        ("a.csv", b"x", ": documents are read from .jsonl and .txt files only"),
    ],
)
def test_bad_documents(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_documents([path]))
    assert str(error.value).startswith(f"{path}{complaint}")


def test_missing_documents(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*/no\.jsonl: No such file or directory"):
        list(read_documents([tmp_path / "no.jsonl"]))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*/folder\.txt: Is a directory"):
        list(read_documents([tmp_path / "folder.txt"]))


def test_shipped_corpus_keeps_its_credits():
    records = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 21
    assert len({record["id"] for record in records}) == 21
    for record in records:
        assert record["title"] and record["source"]
        assert record["license"].startswith("public domain")
        assert len(record["text"]) > 13_000


def test_shipped_tokenizer_keeps_the_text_exactly():
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer.vocab_size == 2048
    tokens = 0
    for document in read_documents([CORPUS]):
        ids = tokenizer.text_to_ids(document.text)
        assert tokenizer.ids_to_text(ids) == document.text
        tokens += len(ids)
    assert tokens == 203_977  # as examples/data/README.md says
    for text in ("  two  spaces \n\n\tand a tab", "日本語 🙂", ""):
        assert tokenizer.ids_to_text(tokenizer.text_to_ids(text)) == text


def test_bad_tokenizers(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer .*/no\.model does not exist"):
        load_tokenizer(tmp_path / "no.model")
    with pytest.raises(UserError, match="is a directory without tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    truncated = tmp_path / "truncated.model"
    truncated.write_bytes(MODEL.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"truncated\.model is not a readable SentencePiece model"):
        load_tokenizer(truncated)


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer trained on the corpus, saved as its checkpoints have it."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in read_documents([CORPUS])), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=0, pad_token="<bos>")
    tokenizer.save(str(path))
    return path


def test_json_tokenizers_keep_the_text_exactly(json_tokenizer):
    """Without the truncation, padding and special tokens that the file asks for."""
    tokenizer = load_tokenizer(json_tokenizer)
    assert tokenizer.vocab_size == 400
    for document in read_documents([CORPUS]):
        ids = tokenizer.text_to_ids(document.text[:5000])
        assert len(ids) > 1000 and 0 not in ids
        assert tokenizer.ids_to_text(ids) == document.text[:5000]
    for text in ("  two  spaces \n\n\tand a tab", "日本語 🙂", "", "x", "a<bos>b"):
        assert tokenizer.ids_to_text(tokenizer.text_to_ids(text)) == text
    assert tokenizer.text_to_ids("a<bos>b")[1] == 0


def test_many_texts_are_tokenized_as_each_alone(json_tokenizer):
    texts = [document.text[:2000] for document in read_documents([CORPUS])]
    texts += ["", " two  spaces ", "naïve 日本 \x00", "<s></s>", "a" * 3000]
    for path in (ROOT / "examples/data/tokenizer.model", json_tokenizer):
        tokenizer = load_tokenizer(path)
        assert tokenizer.texts_to_ids(texts) == [tokenizer.text_to_ids(text) for text in texts]


def test_eos_is_what_the_configuration_beside_names(json_tokenizer, tmp_path):
    file = shutil.copy(json_tokenizer, tmp_path)
    assert load_tokenizer(file).eos_id == -1
    config = tmp_path / "tokenizer_config.json"
    for named, eos in (("<bos>", 0), ({"content": "<bos>"}, 0), (None, -1), ("<other>", -1)):
        config.write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer(tmp_path).eos_id == eos
    config.write_text("[")
    with pytest.raises(UserError, match="is not a readable tokenizer configuration"):
        load_tokenizer(file)


def test_ids_past_a_gap_count(json_tokenizer, tmp_path):
    """Checkpoints have rows between the last piece and the first added token."""
    data = json.loads(json_tokenizer.read_text())
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 450, "content": "<end>"})
    data["model"]["vocab"]["<end>"] = 450
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 451
    assert tokenizer.text_to_ids("<end>") == [450]
    with pytest.raises(UserError, match=r"\.json has no token 451: its ids are below 451$"):
        tokenizer.ids_to_text([3, 451])


def test_pieces_are_not_drawn(json_tokenizer, tmp_path):
    """Also by a file that asks for it: tokens that are kept are the same on all nodes."""
    data = json.loads(json_tokenizer.read_text())
    data["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer, text = load_tokenizer(tmp_path), "one and the same sentence " * 10
    expected = load_tokenizer(json_tokenizer).text_to_ids(text)
    assert tokenizer.text_to_ids(text) == expected
    assert tokenizer.texts_to_ids([text]) == [expected]


def test_directories_hold_one_tokenizer_of_two_kinds(json_tokenizer, tmp_path):
    shutil.copy(MODEL, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": "code.py"}')
    assert load_tokenizer(tmp_path).vocab_size == 2048
    shutil.copy(json_tokenizer, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).vocab_size == 400
    assert tokenizer_file(tmp_path) == tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1]", b"\xff", b'{"model": {"type": "X"}}']
)
def test_bad_json_tokenizers(tmp_path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer\.json$"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def trainer():
    """The module tools/train_tokenizer.py (tools/ is no package)."""
    spec = importlib.util.spec_from_file_location(
        "train_tokenizer", ROOT / "tools/train_tokenizer.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_trainer_makes_the_shipped_file(trainer, tmp_path):
    output = tmp_path / "tokenizer.model"
    trainer.main(["--input", str(CORPUS), "--output", str(output)])

    def pieces(path: Path) -> list[str]:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return [model.id_to_piece(i) for i in range(model.get_piece_size())]

    assert pieces(output) == pieces(MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    with pytest.raises(UserError, match="tokenizer.model exists already"):
        trainer.main(["--input", str(CORPUS), "--output", str(output)])


def test_trainer_refuses_too_little_text(trainer, tmp_path):
    (tmp_path / "a.txt").write_text("hardly anything")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(UserError, match=rf"no tokenizer of 2048 pieces from .*{name}"):
            trainer.train([str(tmp_path / name)], 2048)
