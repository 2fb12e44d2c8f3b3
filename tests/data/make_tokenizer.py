"""Make the small byte-pair vocabulary of the tests, laid out as CLIP's: 256 bytes, the same at a word's end, merges.

The trainer breaks ties at random, so another run makes another vocabulary, as good as the stored one.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

TEXT = """
a photo of a cat sitting on a wooden table next to a cup of coffee, highly detailed, soft light, studio
an oil painting of the old harbour at night, lanterns over the water, by the river, in the rain, in winter
two tigers walking through the forest; it's raining, they're wet, we've seen them, I'm sure he'll say he'd know, don't
a bowl of fruit, in the style of a watercolor painting, bad anatomy, blurry, low quality, 4k, 8k, 35mm, 1920s
der größte Bär läuft über die schöne Straße, où est la bibliothèque, el niño mañana, čeština, þórr, ñandú
Москва ночью, красивый город, Αθήνα το πρωί, 日本語の写真、東京の夜、美しい山、中文测试，한국어 사진,
צילום של חתול, صورة قطة, तस्वीर
🐱 🐶 👩‍👩‍👧 🇩🇪 ✨ ❤️ 🎨 — “quoted” … !!! ??? ... :-) (((best quality))) [low:high]
a:b_c-d #tag @name 100% 5€ <b>bold</b> &amp; &lt;
"""
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def main() -> None:
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.train_from_iterator(TEXT.splitlines() * 3, BpeTrainer(vocab_size=900, end_of_word_suffix="</w>"))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as openai/CLIP orders the bytes
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *SPECIAL]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder = Path(__file__).parent / "tokenizer"
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")


if __name__ == "__main__":
    main()
