"""Weighted and long prompts: brackets and chunks against references written otherwise, and what the pipeline does.

`read_by_character` and `cut` follow the published rules without the package's means: no regular expression, positions
instead of a running state.
"""

import logging
import math
import random
from itertools import pairwise

import pytest
import torch

from depthdiff.cli import main
from depthdiff.prompt_syntax import BREAK, chunk_tokens, parse_prompt, weigh
from depthdiff.tokenizer import clip_tokenizer

ROOM = 75
WORD = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def learnt():
    """One that knows words of several vectors."""
    made = clip_tokenizer()
    made.add_words({"<toy>": 3, "<one>": 1, "<long>": 30, "<huge>": 70, "<many>": 76})
    return made


# Brackets


def spell(parts):
    """Return (character, weight) for each character of a parsed prompt, None for a new chunk."""
    spelt = []
    for part in parts:
        spelt += [None] if part == BREAK else [(letter, part[1]) for letter in part[0]]
    return spelt


def near(ours, reference):
    assert [one and one[0] for one in ours] == [one and one[0] for one in reference]
    for one, other in zip(ours, reference, strict=True):
        if one is not None:
            assert one[1] == pytest.approx(other[1], rel=1e-12)  # factors are multiplied in another order


def number_of(text):
    """Return the number that a text is, or None."""
    text = text.strip()
    digits = text[1:] if text[:1] in ("+", "-") else text
    decimal = digits.replace(".", "", 1)
    return float(text) if decimal.isdigit() else None


def split_run(run):
    """Split text without brackets at each BREAK that is a word of its own, with the spaces around it."""
    sections, start, place = [], 0, run.find("BREAK")
    while place >= 0:
        before, after = run[place - 1 : place], run[place + 5 : place + 6]
        if not (before and before in WORD) and not (after and after in WORD):
            sections.append(run[start:place].rstrip())
            start = place + 5
            while run[start : start + 1].isspace():
                start += 1
        place = run.find("BREAK", place + 1)
    return [*sections, run[start:]]


def read_by_character(text):
    """Read a prompt one character after the other; return what `spell` returns."""
    spelt, rounds, squares, place = [], [], [], 0

    def scale(start, factor):
        spelt[start:] = [one and (one[0], one[1] * factor) for one in spelt[start:]]

    while place < len(text):
        letter, end = text[place], text.find(")", place)
        number = number_of(text[place + 1 : end]) if letter == ":" and end > place and rounds else None
        place += 1
        if letter == "\\":
            if text[place : place + 1] and text[place] in "()[]\\":
                spelt.append((text[place], 1.0))
                place += 1
        elif letter in "([":
            (rounds if letter == "(" else squares).append(len(spelt))
        elif number is not None:
            scale(rounds.pop(), number)
            place = end + 1
        elif letter == ")" and rounds:
            scale(rounds.pop(), 1.1)
        elif letter == "]" and squares:
            scale(squares.pop(), 1 / 1.1)
        elif letter in ")]:":
            spelt.append((letter, 1.0))
        else:
            start = place - 1
            while place < len(text) and text[place] not in "\\()[]:":
                place += 1
            for i, section in enumerate(split_run(text[start:place])):
                spelt += [None] * (i > 0) + [(one, 1.0) for one in section]
    for start in rounds:
        scale(start, 1.1)
    for start in squares:
        scale(start, 1 / 1.1)
    return spelt


def grow(choose, depth=0):
    """Make a random prompt of balanced brackets: its text, and what `spell` must return for it."""
    text, spelt = "", []
    for _ in range(choose.randint(1, 4)):
        kind = choose.choice(["words", "escape", "break"] + ["round", "square", "weight"] * (depth < 4))
        if kind == "words":
            piece = choose.choice(["red", " a cat", ", ", "a: b", "BREAKS", "half BREAK_", " é"])
            text, spelt = text + piece, spelt + [(letter, 1.0) for letter in piece]
        elif kind == "escape":
            letter = choose.choice("()[]\\")
            text, spelt = f"{text}\\{letter}", [*spelt, (letter, 1.0)]
        elif kind == "break":
            text, spelt = f"{text}.  BREAK\n.", [*spelt, (".", 1.0), None, (".", 1.0)]
        else:
            inner, letters = grow(choose, depth + 1)
            number = choose.choice(["1.3", "0.5", "+2", " .25 ", "-1", "1."])
            factor = {"round": 1.1, "square": 1 / 1.1, "weight": float(number)}[kind]
            piece = {"round": f"({inner}.)", "square": f"[{inner}]", "weight": f"({inner}:{number})"}[kind]
            letters = letters + [(".", 1.0)] * (kind == "round")
            text, spelt = text + piece, spelt + [one and (one[0], one[1] * factor) for one in letters]
    return text, spelt


@pytest.mark.parametrize("seed", range(20))
def test_balanced_brackets(seed):
    choose = random.Random(seed)
    for _ in range(25):
        text, expected = grow(choose)
        near(spell(parse_prompt(text)), expected)
        near(read_by_character(text), expected)


@pytest.mark.parametrize("seed", range(20))
def test_brackets_in_any_order(seed):
    choose = random.Random(seed)
    for _ in range(100):
        text = "".join(choose.choices(["(", ")", "[", "]", "\\", ":", "1", ".5", " ", "a", "BREAK", ":1.2)"], k=14))
        near(spell(parse_prompt(text)), read_by_character(text))


PARSED = {
    "": [("", 1.0)],
    "a cat": [("a cat", 1.0)],
    "a (cat) here": [("a ", 1.0), ("cat", 1.1), (" here", 1.0)],
    "((cat))": [("cat", 1.1 * 1.1)],
    "[cat]": [("cat", 1 / 1.1)],
    "(a cat:1.3)": [("a cat", 1.3)],
    "(a [cat] here:2)": [("a ", 2.0), ("cat", 2 / 1.1), (" here", 2.0)],
    r"\(cat\) \[x\] \\ \n": [(r"(cat) [x] \ n", 1.0)],
    "(never closed": [("never closed", 1.1)],
    "[(both": [("both", 1.1 * (1 / 1.1))],
    "never) opened]:1.2)": [("never) opened]:1.2)", 1.0)],
    "(crossed [over) here] end": [("crossed ", 1.1), ("over", 1.0), (" here", 1 / 1.1), (" end", 1.0)],
    "(see: this) (1.2.3:1.2.3) (wait: ...)": [("see: this", 1.1), (" ", 1.0), ("1.2.3:1.2.3", 1.1), (" ", 1.0),
                                              ("wait: ...", 1.1)],
    "[a:1.2]": [("a:1.2", 1 / 1.1)],
    "one\nBREAK  two BREAK": [("one", 1.0), BREAK, ("two", 1.0), BREAK, ("", 1.0)],
    "(one BREAK two:2)": [("one", 2.0), BREAK, ("two", 2.0)],
    "BREAKS break": [("BREAKS break", 1.0)],
    "(a)(b)": [("ab", 1.1)],
}  # fmt: skip


@pytest.mark.parametrize("text", PARSED)
def test_what_is_published_and_what_is_malformed(text):
    parts = parse_prompt(text)
    assert [part for part, _ in parts] == [part for part, _ in PARSED[text]]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in PARSED[text]], rel=1e-12)
    assert all(one[1] != other[1] or one == BREAK for one, other in pairwise(parts))


@pytest.mark.parametrize("text", ["(a:1001)", "((a:-40):40)", "(" * 73 + "a", f"(a:{'9' * 400})"])
def test_weights_out_of_all_range(text):
    with pytest.raises(ValueError, match=r"must be in \[-1000, 1000\]"):
        parse_prompt(text)
    parse_prompt("(a:1000) (b:-1000) (c:0)")


# Chunks


def cut(sections, comma):
    """Cut sections, between which BREAK stands, of (ids of a token or whole word, weight) into rows of (id, weight)."""
    rows = []
    for section in sections:
        rest = section
        while rest:
            ends = [sum(len(ids) for ids, _ in rest[: i + 1]) for i in range(len(rest))]
            end = sum(place <= ROOM for place in ends)  # how many fit
            if end < len(rest) and ends[end - 1] == ROOM and rest[end][0] != [comma]:
                late = [i + 1 for i in range(end) if rest[i][0] == [comma] and ends[i] > ROOM - 20]
                end = late[-1] if late else end
            rows.append([(index, weight) for ids, weight in rest[:end] for index in ids])
            rest = rest[end:]
        if not section:
            rows.append([])
    return rows if sections[-1] or len(rows) == 1 else rows[:-1]


def framed(rows, tokenizer):
    """Put start, end and padding around rows: ids and weights, (n, 77) each."""
    ids = torch.full((len(rows), ROOM + 2), tokenizer.pad_token_id)
    weights = torch.ones(len(rows), ROOM + 2)
    for i, row in enumerate(rows):
        ids[i, : len(row) + 2] = torch.tensor([49406, *(index for index, _ in row), 49407])
        weights[i, 1 : len(row) + 1] = torch.tensor([weight for _, weight in row])
    return ids, weights


def same_chunks(text, rows, tokenizer):
    chunks = chunk_tokens(parse_prompt(text), tokenizer)
    ids, weights = framed(rows, tokenizer)
    assert torch.equal(torch.tensor([chunk.ids for chunk in chunks]), ids)
    assert torch.equal(torch.tensor([chunk.weights for chunk in chunks]), weights)


@pytest.mark.parametrize("count", [0, 1, 54, 55, 56, 74, 75, 76, 94, 95, 96, 150, 151, 300])
@pytest.mark.parametrize("commas", [0, 0.02, 0.1, 0.6])
def test_chunks(count, commas, tokenizer):
    """Every word is one token; brackets change weights and no cut."""
    choose, ids = (
        random.Random(f"{count} {commas}"),
        {word: tokenizer(word).input_ids[1] for word in ("cat", "dog", ",")},
    )
    text, section = "", []
    for _ in range(count):
        word = "," if choose.random() < commas else choose.choice(["cat", "dog"])
        number = choose.choice([None, 1.5, 0.25])
        text += f" {word}" if number is None else f" ({word}:{number})"
        section.append(([ids[word]], number or 1.0))
    same_chunks(text, cut([section], ids[","]), tokenizer)


@pytest.mark.parametrize("seed", range(40))
def test_chunks_with_everything(seed, learnt):
    """Commas, new chunks and words of several vectors, most of it near the ends of chunks."""
    choose = random.Random(seed)
    ids = {word: learnt(word).input_ids[1:-1] for word in ("cat", ",", "<toy>", "<one>", "<long>")}
    text, sections = "", [[]]
    for _ in range(6):
        words = ["cat"] * choose.randint(45, 62)
        words += choose.choices(["cat", ",", "<toy>", "<one>", "<long>"], [9, 1, 1, 1, 0.2], k=choose.randint(10, 25))
        for word in words:
            number = choose.choice([1.0, 1.0, 0.5])
            text += f" ({word}:{number})" if number != 1 else f" {word}"
            sections[-1].append((ids[word], number))
        if choose.random() < 0.6:
            while choose.random() < 0.5 and sum(len(one) for one, _ in sections[-1]) % 75:  # often fill a chunk
                text, _ = text + " cat", sections[-1].append((ids["cat"], 1.0))
            text += " BREAK"
            sections.append([])
    same_chunks(text, cut(sections, ids[","][0]), learnt)


@pytest.mark.parametrize("place", [0, 54, 55, 56, 73, 74, 75, 76])
def test_one_comma_at_a_time(place, tokenizer):
    """It ends a chunk from its 56th token on; as the first of the next it does not go back."""
    words = ["cat"] * 200
    words[place] = ","
    chunks = chunk_tokens([(" ".join(words), 1.0)], tokenizer)
    first = place + 1 if 55 <= place <= 74 else 75
    assert [chunk.ids.index(49407) - 1 for chunk in chunks] == [first, 75, 125 - first]


@pytest.mark.parametrize("counts", [(0, 1), (1, 0), (0, 0), (3, 0, 4), (75, 1), (76, 80, 0), (75, 75), (10, 0, 0)])
def test_new_chunks(counts, tokenizer):
    cat = tokenizer("cat").input_ids[1]
    text = " BREAK ".join(" ".join(["cat"] * count) for count in counts)
    same_chunks(text, cut([[([cat], 1.0)] * count for count in counts], -1), tokenizer)


def test_a_plain_text_is_what_the_tokenizer_makes_of_it(tokenizer):
    for text in ("", "two tigers, at night", "a: b", "cat " * 75):
        [chunk] = chunk_tokens(parse_prompt(text), tokenizer)
        assert chunk.ids == tokenizer(text, padding="max_length", max_length=77).input_ids
        assert set(chunk.weights) == {1.0}


def test_shorter_chunks(tokenizer):
    """Of a text encoder that reads less than a comma's 20 tokens at once."""
    for text, lengths in (("cat " * 25, [10, 10, 5]), (", " + "cat " * 12, [1, 10, 2]), ("cat cat, " * 4, [9, 3])):
        chunks = chunk_tokens(parse_prompt(text), tokenizer, 12)
        assert {len(chunk.ids) for chunk in chunks} == {len(chunk.weights) for chunk in chunks} == {12}
        assert [chunk.ids.index(49407) - 1 for chunk in chunks] == lengths


def test_a_full_chunk_before_a_break_stays_whole(tokenizer):
    """Nothing follows that would have to move, so that its comma does not count."""
    cat, comma = (tokenizer(word).input_ids[1] for word in ("cat", ","))
    rows = [[(cat, 1.0)] * 60 + [(comma, 1.0)] + [(cat, 1.0)] * 14, [(cat, 1.0)]]
    same_chunks("cat " * 60 + ", " + "cat " * 14 + "BREAK cat", rows, tokenizer)


def test_words_of_several_vectors_stay_whole(learnt):
    tokenizer = learnt
    toy, cat = tokenizer.learnt_words["<toy>"], tokenizer("cat").input_ids[1]
    for before, lengths in ((72, [75]), (73, [73, 3]), (74, [74, 3]), (75, [75, 3]), (148, [75, 73, 3])):
        rows = [[(cat, 1.0)] * min(75, before - 75 * i) for i in range(math.ceil(before / 75))]
        rows = [rows[0] + [(index, 1.2) for index in toy]] if before == 72 else [*rows, [(index, 1.2) for index in toy]]
        assert [len(row) for row in rows] == lengths
        same_chunks("cat " * before + "(<toy>:1.2)", rows, tokenizer)
    comma = tokenizer(",").input_ids[1]  # the chunk is full, so that the comma counts before a word as well
    rows = [[(cat, 1.0)] * 60 + [(comma, 1.0)], [(cat, 1.0)] * 14 + [(index, 1.0) for index in toy]]
    same_chunks("cat " * 60 + ", " + "cat " * 14 + "<toy>", rows, tokenizer)
    huge = [(index, 1.0) for index in tokenizer.learnt_words["<huge>"]]  # does not fit behind what moves on
    same_chunks("cat " * 60 + ", " + "cat " * 14 + "<huge>", [rows[0], [(cat, 1.0)] * 14, huge], tokenizer)
    with pytest.raises(ValueError, match="has 76 vectors, a chunk of the text encoder holds 75"):
        chunk_tokens(parse_prompt("<many>"), tokenizer)


# The pipeline


def read(pipe, prompt, negative=None, **options):
    return pipe.encode_prompt(prompt, "cpu", 1, True, negative, prompt_syntax="a1111", **options)


@pytest.mark.parametrize("count, chunks", [(75, 1), (76, 2), (150, 2), (151, 3), (300, 4)])
@pytest.mark.parametrize("side", ["prompt", "negative"])
def test_both_sides_are_equally_long_and_nothing_is_cut(pipe, count, chunks, side, caplog):
    long = "! " * count
    assert len(pipe.tokenizer(long).input_ids) == count + 2
    with caplog.at_level(logging.WARNING):
        sides = read(pipe, *((long, "!") if side == "prompt" else ("!", long)))
    assert not caplog.records
    short = sides[1 if side == "prompt" else 0]
    assert sides[0].shape == sides[1].shape == (1, 77 * chunks, pipe.text_encoder.config.hidden_size)
    one, empty = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("!", ""))
    assert torch.equal(short, torch.cat([one, *[empty] * (chunks - 1)], dim=1))


def test_a_batch_of_different_lengths_is_what_each_text_gives_alone(pipe):
    texts = ["a (red:1.4) ball", "! " * 100, "x BREAK (y) BREAK z"]
    together, negative = read(pipe, texts, ["(bad:0.5)"])
    assert together.shape == negative.shape == (3, 231, together.shape[2])
    [empty] = pipe.encode_prompt("", "cpu", 1, False)[0]
    for text, row in zip(texts, together, strict=True):
        [alone] = read(pipe, text)[0]
        alone = torch.cat([alone, *[empty] * (3 - len(alone) // 77)])
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-6)  # observed: 0; other batches may add up otherwise
    twice = pipe.encode_prompt(texts, "cpu", 2, True, prompt_syntax="a1111")[0]
    assert torch.equal(twice, together.repeat_interleave(2, dim=0))


def test_weights_multiply_and_the_mean_stays(pipe):
    plain, weighted = pipe.encode_prompt("a red ball", "cpu", 1, False)[0], read(pipe, "a (red:1.7) ball")[0]
    assert weighted.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)  # observed: 4e-7
    pieces = [len(pipe.tokenizer(text).input_ids) - 2 for text in ("a ", "red", " ball")]
    weights = torch.ones(77)
    weights[1 + pieces[0] : 1 + pieces[0] + pieces[1]] = 1.7
    ratio = weighted[0] / (plain[0] * weights[:, None])
    assert ratio.std() < 1e-4 and (ratio.mean() - 1).abs() > 1e-6  # one factor for all
    assert torch.equal(read(pipe, "(a red ball:1)")[0], plain)


def test_weigh_keeps_rows_of_ones_and_works_in_half_precision():
    embeds = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.tensor([[1.0] * 5, [1, 2, 0.5, -1, 1]])
    assert torch.equal(weigh(torch.zeros(1, 5, 6), weights[:1]), torch.zeros(1, 5, 6))  # whose mean is 0
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        given = embeds.to(dtype)
        result = weigh(given, weights)
        assert result.dtype == dtype and torch.equal(result[0], given[0])
        exact = given[1].double() * weights[1, :, None].double()
        exact *= given[1].double().mean() / exact.mean()
        assert (result[1] - exact).abs().max() < bound * exact.abs().max()  # observed: a third of each, or less


def test_clip_skip_counts_in_every_chunk_of_the_prompt(pipe):
    text = "! " * 80
    positive, negative = read(pipe, text, text, clip_skip=1)
    skipped, whole = (pipe.encode_prompt("! " * 75, "cpu", 1, False, clip_skip=skip)[0] for skip in (1, None))
    rest = [pipe.encode_prompt("! " * 5, "cpu", 1, False, clip_skip=skip)[0] for skip in (1, None)]
    assert torch.equal(positive, torch.cat([skipped, rest[0]], dim=1))
    assert torch.equal(negative, torch.cat([whole, rest[1]], dim=1))


def test_learnt_words_are_read_whole_and_weighted(pipe):
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<toy>": torch.randn(3, width)})
    long = read(pipe, "! " * 74 + "(<toy>:1.3)")[0]
    assert torch.equal(long[:, :77], pipe.encode_prompt("! " * 74, "cpu", 1, False)[0])
    assert torch.equal(long[:, 77:], read(pipe, "(<toy>:1.3)")[0])


def test_embeddings_beside_a_text(pipe):
    """As many chunks as they hold; less than the text, or a part of a chunk, is refused."""
    width = pipe.text_encoder.config.hidden_size
    given = torch.randn(1, 154, width)
    positive, negative = read(pipe, "a (cat)", negative_prompt_embeds=given)
    assert torch.equal(negative, given) and positive.shape == given.shape
    assert torch.equal(positive[:, :77], read(pipe, "a (cat)")[0])
    positive, negative = read(pipe, None, "(bad) hands", prompt_embeds=given)
    assert torch.equal(positive, given) and torch.equal(negative[:, :77], read(pipe, "", "(bad) hands")[1])
    for length, text in ((154, "! " * 151), (100, "!"), (76, "!")):
        with pytest.raises(ValueError, match=f"a multiple of 77 tokens, and at least .* got {length}; pass both"):
            read(pipe, text, negative_prompt_embeds=torch.randn(1, length, width))
    for negative in (None, given):
        with pytest.raises(ValueError, match="`prompt_syntax` is for prompts given as text, got embeddings"):
            read(pipe, None, prompt_embeds=given, negative_prompt_embeds=negative)


def test_negative_embeddings_do_not_count_without_guidance(pipe):
    given = torch.randn(1, 5, pipe.text_encoder.config.hidden_size)
    options = {"negative_prompt_embeds": given, "prompt_syntax": "a1111"}
    assert pipe.encode_prompt("x", "cpu", 1, False, **options)[0].shape[1] == 77
    embeds = {"prompt_embeds": given, "prompt_syntax": "a1111"}
    assert torch.equal(pipe.encode_prompt(None, "cpu", 1, False, "bad", **embeds)[0], given)


@pytest.mark.parametrize("value", ["A1111", "compel", "", 1, True, ["a1111"]])
def test_unknown_syntax(pipe, value):
    with pytest.raises(ValueError, match="prompt_syntax must be 'a1111' or None, got"):
        pipe.encode_prompt("a cat", prompt_syntax=value)


def test_a_picture_of_long_prompts(pipe, small_photo):
    positive, negative = read(pipe, "a (red:1.3) ball BREAK " + "! " * 80, "bad")
    options = {"image": small_photo, "num_inference_steps": 2, "output_type": "np"}
    picture = pipe(prompt_embeds=positive, negative_prompt_embeds=negative, **options).images
    assert picture.shape == (1, 88, 120, 3) and picture.std() > 0


# Without the syntax


@pytest.mark.parametrize("options", [{}, {"clip_skip": 1}])
def test_what_is_cut_off_is_named_on_both_sides(pipe, options, caplog):
    """Brackets are text then; a text that several pictures share is named once."""
    pipe.load_textual_inversion({"<toy>": torch.randn(3, pipe.text_encoder.config.hidden_size)})
    positive = pipe.encode_prompt(["! " * 73 + "<toy> end"] * 2, "cpu", 1, True, "( " * 75 + "bad hands", **options)[0]
    assert positive.shape[1] == 77
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    first, second = (record.getMessage() for record in caplog.records)
    assert "more than 75 tokens" in first and first.endswith("'<toy> end'")
    assert "more than 75 tokens" in second and second.endswith("'bad hands'")
    caplog.clear()
    pipe.encode_prompt("a cat", "cpu", 1, True, "! " * 75)
    assert not caplog.records


def test_the_command_warns_of_words_only_where_they_are_not_read(tmp_path, tiny_folder, small_photo, capsys):
    small_photo.save(tmp_path / "photo.png")
    call = ["! " * 80, str(tmp_path / "photo.png"), "-n", "? " * 80, "--model", str(tiny_folder), "--steps", "1"]
    for more, lines in (([], 2), (["--prompt-syntax", "a1111"], 0)):
        assert main([*call, "-o", str(tmp_path / "out.png"), *more]) == 0
        assert capsys.readouterr().err.count("not read") == lines
    with pytest.raises(SystemExit):
        main([*call, "--prompt-syntax", "compel"])
