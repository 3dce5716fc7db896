"""Tables in the forms that people have: separators, no header, several caption columns, JSON."""

import json
from pathlib import Path

import pytest

from fastvlp.data.sources import find_format, make_source
from fastvlp.data.sources.importing import import_data
from fastvlp.errors import UserError
from tests.data.read_source import picture, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(picture((40 * n, 0, 0)))
    return tmp_path


def captions(path: Path, **options: object) -> dict[str, list[str]]:
    infos, dropped, _ = read(path, **options)
    assert not dropped
    return {key: info["captions"] for key, info in infos.items()}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_separator_is_found(folder: Path, separator: str, suffix: str) -> None:
    other = ", and" if separator != "," else " and"
    lines = [separator.join(cells) for cells in (("filepath", "title"), ("0.jpg", f"a red box{other} more"))]
    assert captions(write(folder / f"t.{suffix}", "\n".join(lines))) == {"0": [f"a red box{other} more"]}


@pytest.mark.parametrize(("name", "separator"), [("t.token", "\t"), ("t.csv", ","), ("t.csv", "\t"), ("t.tsv", ";")])
@pytest.mark.parametrize("first", ["a/b", "0.jpg", '"', "\x00", "x" * 200_000])
def test_a_damaged_first_line_costs_no_other(folder: Path, first: str, name: str, separator: str) -> None:
    lines = [first, *(f"{n}.jpg#0{separator}number {n}" for n in (1, 2, 3))]
    path = write(folder / name, "\n".join(lines))
    infos, dropped, _ = read(path)
    assert {key: info["captions"] for key, info in infos.items()} == {str(n): [f"number {n}"] for n in (1, 2, 3)}
    assert [*dropped] == [f"{name}:1"]


@pytest.mark.parametrize("first", ["broken,a 0", "a/b c,a 0", "\x00.jp,a 0", "bro.ken,a man in a hat runs", ",a 0"])
def test_a_damaged_first_name_of_a_table_without_header_costs_no_other(folder: Path, first: str) -> None:
    infos, dropped, _ = read(write(folder / "t.csv", f"{first}\n1.jpg,a 1\n2.jpg,a 2\n"))
    assert {key: info["captions"] for key, info in infos.items()} == {"1": ["a 1"], "2": ["a 2"]}
    assert [*dropped] == ["t.csv:1"]


def test_of_more_columns_only_a_line_that_can_be_no_header_is_damaged(folder: Path) -> None:
    infos, dropped, _ = read(write(folder / "t.csv", "bro/ken,0,a 0\n1.jpg,1,a 1\n2.jpg,2,a 2\n"))
    assert {key: info["captions"] for key, info in infos.items()} == {"1": ["a 1"], "2": ["a 2"]}
    assert [*dropped] == ["t.csv:1"]
    path = write(folder / "u.csv", "bild,nummer,text\n1.jpg,1,a 1\n")
    with pytest.raises(UserError, match=r"bild, nummer, text.*`image_column`"):
        read(path)


def test_a_header_of_names_that_are_given_is_one(folder: Path) -> None:
    path = write(folder / "t.csv", "bild,was man sieht ist\n1.jpg,a 1\n")
    assert captions(path, image_column="bild", caption_column="was man sieht ist") == {"1": ["a 1"]}
    infos, dropped, _ = read(path)
    assert infos["1"]["captions"] == ["a 1"] and [*dropped] == ["t.csv:1"]


@pytest.mark.parametrize("pictures_too", [False, True])
def test_several_tables_in_a_folder_are_given_by_one_path_or_a_pattern(tmp_path: Path, pictures_too: bool) -> None:
    source, images = tmp_path / "source", tmp_path / "source/images"
    images.mkdir(parents=True)
    for n in range(3):
        (images / f"{n}.jpg").write_bytes(picture((40 * n, 0, 0)))
        write(source / f"part{n}.csv", f"image,caption\nimages/{n}.jpg,number {n}\n")
    if pictures_too:
        (source / "0.jpg").write_bytes(picture())
    for options in ({}, {"format": "table"}):
        with pytest.raises(UserError, match=r"'.*/\*\.csv' \(in quotes\)"):
            import_data(source, tmp_path / "out", progress=False, **options)
    imported = import_data(source / "*.csv", tmp_path / "out", progress=False)
    assert imported.written == {"train": 3} and not imported.dropped
    (source / "part1.csv").unlink()
    (source / "part2.csv").unlink()
    with pytest.raises(UserError, match=rf"give the path {source}/part0\.csv"):
        find_format(source)


def test_flickrs_files_have_no_header_even_if_their_first_image_has_no_name(folder: Path) -> None:
    infos, dropped, _ = read(write(folder / "t.token", "broken\ta 0\n1.jpg#0\ta 1\n1.jpg#1\tb 1\n2.jpg#0\ta 2"))
    assert {key: info["captions"] for key, info in infos.items()} == {"1": ["a 1", "b 1"], "2": ["a 2"]}
    assert len(dropped) == 1


def test_a_line_of_more_cells_changes_no_columns(folder: Path) -> None:
    infos, dropped, _ = read(write(folder / "t.csv", "0.jpg,a dog\n1.jpg,a cat, asleep\n2.jpg,a cow"))
    assert {key: info["captions"] for key, info in infos.items()} == {"0": ["a dog"], "2": ["a cow"]}
    assert [*dropped] == ["t.csv:2"]


def test_flickr30ks_results(folder: Path) -> None:
    lines = ["image_name| comment_number| comment", "0.jpg| 0| A dog runs .", "0.jpg| 1| Brown dog , running ."]
    path = write(folder / "results.csv", "\n".join([*lines, "1.jpg| 4   A dog runs across", "1.jpg| 0| Two dogs"]))
    infos, dropped, notes = read(path)
    assert infos["0"]["captions"] == ["A dog runs .", "Brown dog , running ."]
    assert infos["1"]["captions"] == ["Two dogs"] and not dropped
    assert "rows whose comment is empty" in notes


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token"])
def test_flickrs_tokens(folder: Path, name: str) -> None:
    path = write(folder / name, '0.jpg#0\tA child , in pink\n0.jpg#1\tA "girl\n1.jpg#0\tTwo\n')
    assert captions(path) == {"0": ["A child , in pink", 'A "girl'], "1": ["Two"]}


def test_flickr8ks_lists_say_which_split_an_image_is_of(folder: Path) -> None:
    path = write(
        folder / "Flickr8k.token.txt", "".join(f"{n}.jpg#{k}\ttext {n} {k}\n" for n in range(4) for k in (0, 1))
    )
    for n, name in enumerate(("train", "dev", "test")):
        write(folder / f"Flickr_8k.{name}Images.txt", f"{n}.jpg\n")
    infos, dropped, notes = read(path)
    assert not dropped and all(len(info["captions"]) == 2 for info in infos.values())
    assert {key: info.get("split") for key, info in infos.items()} == {"0": "train", "1": "dev", "2": "test", "3": None}
    assert sum("none of the lists" in note for note in notes) == 2
    import_data(path, folder / "out", progress=False)
    assert {place.name for place in (folder / "out").iterdir() if place.is_dir()} == {"train", "dev", "test"}


def test_captions_txt_and_images_in_a_folder_beside_it(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images/a.jpg").write_bytes(picture())
    path = write(tmp_path / "captions.txt", 'image,caption\na.jpg,"one, two"\na.jpg,three\n')
    assert captions(path) == {"a": ["one, two", "three"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "0.jpg,a dog\n1.jpg,two cups\n"),
        ("t.csv", "0.jpg\ta dog\n1.jpg\ttwo cups\n"),
        ("t.tsv", "a dog\t0.jpg\ntwo cups\t1.jpg\n"),
        ("t.csv", "0.jpg,0,a dog\n1.jpg,1,two cups\n"),
        ("t.csv", "\ufeff0.jpg;a dog\r\n1.jpg;two cups\r\n"),
    ],
)
def test_a_table_without_header(folder: Path, name: str, text: str) -> None:
    assert captions(write(folder / name, text)) == {"0": ["a dog"], "1": ["two cups"]}


def test_a_table_without_header_and_with_several_texts_asks_for_the_column(folder: Path) -> None:
    path = write(folder / "t.csv", "0.jpg,a dog,Bob\n1.jpg,two cups,Eve\n")
    with pytest.raises(UserError, match=r"column 2, column 3.*`caption_column`"):
        read(path)
    assert captions(path, caption_column="column 2") == {"0": ["a dog"], "1": ["two cups"]}
    assert captions(write(folder / "u.csv", "x.jpg,caption\n"), header="no", images="blank") == {"x": ["caption"]}


def test_several_columns_of_captions(folder: Path) -> None:
    path = write(folder / "t.csv", "image,caption_1,caption_2,by\n0.jpg,a dog,one dog,me\n1.jpg,x,,me\n")
    assert captions(path) == {"0": ["a dog", "one dog"], "1": ["x"]}
    assert captions(path, caption_column="caption_1") == {"0": ["a dog"], "1": ["x"]}
    assert captions(path, caption_column="caption_2+by")["0"] == ["one dog", "me"]
    assert read(path)[0]["0"]["by"] == "me"


@pytest.mark.parametrize("cell", ['["A dog runs.", "It is brown."]', "['A dog runs.', 'It is brown.']"])
def test_a_list_in_a_cell_is_a_list_of_captions(folder: Path, cell: str) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    path = write(folder / "t.csv", f'raw,split,filename\n{quoted},train,0.jpg\n"[music]",train,1.jpg\n')
    assert captions(path, caption_column="raw") == {"0": ["A dog runs.", "It is brown."], "1": ["[music]"]}


def test_nested_lists_and_objects_are_captions(folder: Path) -> None:
    rows = [
        {"sentences": [["\u4e00\u53ea\u72d7", "\u72d7"]], "bbox": [[1, 1, 10, 10]], "image_id": "./0.jpg"},
        {"sentences": [{"raw": "one", "tokens": ["one"]}, {"raw": "two"}], "image_id": "1.jpg"},
    ]
    path = write(folder / "t.jsonl", "\n".join(map(json.dumps, rows)))
    for options in ({}, {"image_column": "image_id", "caption_column": "sentences"}):
        assert captions(path, **options) == {"0": ["\u4e00\u53ea\u72d7", "\u72d7"], "1": ["one", "two"]}


def test_bad_lines_of_a_csv_are_dropped_alone(folder: Path) -> None:
    lines = ["image,caption", "0.jpg,a,dog", '1.jpg,"open', "2.jpg,fine", '3.jpg,"two\nlines, ""quoted"""', "0.jpg,b"]
    (folder / "t.csv").write_bytes("\n".join(lines).encode() + b"\n1.jpg,caf\xe9\n")
    infos, dropped, _ = read(folder / "t.csv")
    found = {key: info["captions"] for key, info in infos.items()}
    assert found == {"1": ['"open'], "2": ["fine"], "3": ['two\nlines, "quoted"'], "0": ["b"]}
    assert dropped.keys() == {"t.csv:2", "t.csv:8"} and "UTF-8" in dropped["t.csv:8"]


def test_utf_16_as_excel_writes_it(folder: Path) -> None:
    (folder / "t.csv").write_bytes("image\tcaption\r\n0.jpg\tcaf\u00e9\r\n".encode("utf-16"))
    assert captions(folder / "t.csv") == {"0": ["caf\u00e9"]}


def test_a_list_of_json_objects(folder: Path) -> None:
    rows = [{"image": "0.jpg", "caption": "a dog", "image_id": "c1"}, {"image": "0.jpg", "caption": ["x", "one dog"]}]
    path = write(folder / "train.json", [*rows, 7, {"caption": "no image"}])
    infos, dropped, _ = read(path)
    assert infos["0"]["captions"] == ["a dog", "x", "one dog"] and dropped.keys() == {
        "train.json: row 3",
        "train.json: row 4",
    }
    assert captions(write(folder / "a.json", {"data": rows[:1]})) == {"0": ["a dog"]}
    assert captions(write(folder / "b.json", {"0.jpg": "one", "1.jpg": ["two", "three"]})) == {
        "0": ["one"],
        "1": ["two", "three"],
    }
    assert captions(write(folder / "c.json", "\n".join(map(json.dumps, rows)))) == {"0": ["a dog", "x", "one dog"]}


def test_questions_and_answers(folder: Path) -> None:
    rows = [
        {"image": "0.jpg", "question": "what?", "answer": ["a dog", "dog"], "question_id": 1, "dataset": "vqa"},
        {"image": "0.jpg", "question": "how many?", "answer": "0"},
        {"image": "0.jpg", "question": "unanswered?"},
        {"image": "1.jpg", "question": "which?", "answer": ["red"] * 3 + ["blue"] * 7},
        {"image": "1.jpg", "question": "scored?", "answers": {"yes": 0.9}},
    ]
    infos, _, _ = read(write(folder / "t.json", rows))
    assert infos["0"]["questions"] == [
        {"question": "what?", "answers": {"a dog": 1.0, "dog": 1.0}},
        {"question": "how many?", "answers": {"0": 1.0}},
        {"question": "unanswered?", "answers": {}},
    ]
    assert infos["1"]["questions"][0]["answers"] == pytest.approx({"red": 0.9, "blue": 1.0})
    assert infos["1"]["questions"][1]["answers"] == {"yes": 0.9}


def test_conversations(folder: Path) -> None:
    def turns(*texts: str) -> list[dict]:
        return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]

    rows = [
        {"id": 1, "image": "0.jpg", "conversations": turns("<image>\nWhat is it?", "A dog.", "Its colour?", "Brown.")},
        {
            "id": 2,
            "image": "1.jpg",
            "conversations": turns("Provide a brief description of the image.\n<image>", "Cups."),
        },
        {
            "image": "2.jpg",
            "messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}],
        },
    ]
    infos, _, _ = read(write(folder / "llava.json", rows))
    assert infos["0"]["questions"] == [
        {"question": "What is it?", "answers": {"A dog.": 1.0}},
        {"question": "Its colour?", "answers": {"Brown.": 1.0}},
    ]
    assert infos["1"]["captions"] == ["Cups."]
    assert infos["2"]["questions"] == [{"question": "Where?", "answers": {"Here.": 1.0}}]


def test_odd_captions_are_counted(folder: Path) -> None:
    cells = ["a dog", None, ["one", "two", 3, None, ""], 42, {"en": "a dict"}, [], ["x"]]
    rows = [{"image": f"{n % 4}.jpg", "caption": cell, "score": float("nan")} for n, cell in enumerate(cells)]
    infos, dropped, notes = read(write(folder / "t.jsonl", "\n".join(map(json.dumps, rows))))
    found = {key: info["captions"] for key, info in infos.items()}
    assert found == {"0": ["a dog", "a dict"], "1": [], "2": ["one", "two", "x"], "3": []} and not dropped
    assert notes.count("values of caption that are no text are left out") == 2
    assert notes.count("rows whose caption is empty") == 2


def test_captions_by_language(folder: Path) -> None:
    rows = [
        {"image": "0.jpg", "caption": {"en": "a", "zh": ["\u4e00"]}},
        {"image": "1.jpg", "caption": {"zh": "\u4e8c"}},
    ]
    infos, _, notes = read(write(folder / "t.json", rows))
    assert infos["0"] == {"captions": ["a"], "captions_zh": ["\u4e00"]} and infos["1"]["captions_zh"] == ["\u4e8c"]
    assert not any("no text" in note for note in notes)


def test_a_row_of_two_images(folder: Path) -> None:
    rows = [{"image": ["0.jpg", "1.jpg"], "caption": "two"}, {"images": ["2.jpg"], "caption": "one"}]
    path = write(folder / "t.jsonl", "\n".join(map(json.dumps, rows)))
    (two, one) = make_source(find_format(path), {}).read(path)
    assert two.images == (picture((0, 0, 0)), picture((40, 0, 0))) and len(one.images) == 1


def test_a_table_of_images_and_labels(folder: Path) -> None:
    infos, _, _ = read(write(folder / "t.csv", "image,label\n0.jpg,cat\n1.jpg,0\n"))
    assert [info["label"] for info in infos.values()] == ["cat", "0"]
    done = import_data(folder / "t.csv", folder / "out")
    assert done.written == {"train": 2} and not done.dropped


def test_rows_of_one_image_that_differ_are_noted(folder: Path) -> None:
    infos, _, notes = read(write(folder / "t.csv", "image,caption,label\n0.jpg,a,cat\n0.jpg,b,dog\n"))
    assert infos["0"]["label"] == "cat" and notes == ["rows of one image differ in label; that of the first is used"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Train_GCC-training.tsv", "a very typical bus station\thttp://a.example/1.jpg?w=2\nx\thttp://a.example/2\n"),
        ("t.csv", "url,caption\nhttps://a.example/1.jpg,x\n"),
        ("t.tsv", "TEXT\tURL\nx\thttps://a.example/1\n"),
        ("t.jsonl", '{"url": "s3://bucket/1.jpg", "text": "x"}'),
    ],
)
def test_a_table_of_urls_is_answered_with_the_command_that_downloads_them(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match=r"URLs.*`img2dataset --url_list .*--url_col (url|URL) --caption_col"):
        read(write(tmp_path / name, text))


def test_no_message_shows_more_than_a_line_of_a_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", ("1\t" + "QUJD" * 5000 + "\n") * 2)
    with pytest.raises(UserError) as error:
        read(path)
    assert len(str(error.value)) < 500
    path = write(tmp_path / "t.jsonl", json.dumps({"x" * 9000: 1, "split": "y" * 9000, "image": "z" * 9000}))
    with pytest.raises(UserError) as error:
        read(path)
    assert len(str(error.value)) < 500
